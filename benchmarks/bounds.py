"""What the machine can do at best, measured in the same run, and how long a case must take on it.

A bound is the bytes that any implementation must move over the measured bandwidth, or its flops over the measured rate
of a library matmul, whichever takes longer. Rates are the best of several runs over buffers that are far larger than
the caches and whose pages exist already. On a CPU, a case that fits into a cache can therefore beat its bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import clocks
import torch
from torch import Tensor

BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
MATMULS = {"cpu": ((256, 256, 256), (2048, 1024, 8192)), "cuda": ((256, 256, 256), (8192, 4096, 16384))}
LONGEST_MATMUL_S = 2.0
REPEATS = 7

# Reads of a whole buffer. Which of them gets most out of the memory differs between machines.
READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.sum over float32": lambda x: _as(x, torch.float32).sum(),
    "torch.amax over float32": lambda x: _as(x, torch.float32).amax(),
    "torch.dot over float32 with itself": lambda x: torch.dot(_as(x, torch.float32), _as(x, torch.float32)),
    "torch.sum over float64": lambda x: _as(x, torch.float64).sum(),
    "torch.amax over int32": lambda x: _as(x, torch.int32).amax(),
}


@dataclass(frozen=True)
class Work:
    """The least any implementation must do: bytes read and written, and floating-point operations."""

    read: int
    written: int = 0
    flops: int = 0


@dataclass
class Rates:
    """Bytes and operations per second."""

    device: torch.device
    read: float = 0.0
    read_with: str = ""
    copy: float = 0.0
    copy_with: str = ""
    matmul: dict[str, float] = field(default_factory=dict)

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        """The bound. Written bytes pair with as many read, at the rate of a copy; the rest has the rate of reads."""
        both = min(work.read, work.written)
        moving = 2 * both / self.copy + (work.read - both + work.written - both) / self.read
        return max(moving, work.flops / self._best_flops(dtype) if work.flops else 0.0)

    def _best_flops(self, dtype: torch.dtype) -> float:
        # Where a narrow dtype is slower than float32, widening it first is what an implementation should do.
        return max(self._flops(dtype), self._flops(torch.float32))

    def _flops(self, dtype: torch.dtype) -> float:
        name = str(dtype).removeprefix("torch.")
        if name not in self.matmul:
            self.matmul[name] = 0.0
            for m, k, n in MATMULS[self.device.type]:
                flops = 2 * m * k * n
                if self.matmul[name] and flops / self.matmul[name] > LONGEST_MATMUL_S:
                    break  # a dtype that this device has no instructions for is a thousand times slower
                a, b = (torch.randn(size, device=self.device).to(dtype) for size in ((m, k), (k, n)))
                out = torch.zeros(m, n, device=self.device, dtype=dtype)
                self.matmul[name] = max(self.matmul[name], flops / _best(partial(torch.mm, a, b, out=out), self.device))
        return self.matmul[name]


def measure_rates(device: torch.device) -> Rates:
    """Bandwidths of the machine; matmul rates follow when a case asks for one."""
    source = torch.ones(BUFFER_BYTES[device.type], dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.zeros_like(source)
    rates = Rates(device)
    rates.read_with = bare_reader(device)
    rates.read = source.nbytes / _best(lambda: READERS[rates.read_with](source), device)
    writers: dict[str, Callable[[], object]] = {
        "copy_ between two buffers": lambda: target.copy_(source),
        "neg_ in place": lambda: target.neg_(),
    }
    seconds = {name: _best(writer, device) for name, writer in writers.items()}
    rates.copy_with = min(seconds, key=lambda name: seconds[name])
    rates.copy = 2 * source.nbytes / seconds[rates.copy_with]
    return rates


@functools.cache
def bare_reader(device: torch.device) -> str:
    """The name of the fastest read here."""
    source = torch.ones(BUFFER_BYTES[device.type], dtype=torch.uint8, device=device)
    return min(READERS, key=lambda name: _best(lambda: READERS[name](source), device))


def bare_read(tensor: Tensor) -> Tensor:
    """Reads a tensor once, as fast as anything in torch does."""
    return READERS[bare_reader(tensor.device)](tensor)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Only the bytes matter here. Reducing a narrow dtype would spend its time on conversions.
    octets = tensor.view(-1).view(torch.uint8)
    return octets[: octets.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _best(call: Callable[[], object], device: torch.device) -> float:
    call()
    return min(clocks.of(device).seconds(call) for _ in range(REPEATS))
