"""Clocks: how long the device needs for a call, and for how long the call keeps its caller.

A CPU has done the work of a call when it returns, so that one time says both. A GPU works on when the call has
returned, and its two times have nothing to do with one another: a small op is over before its successor is launched.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch

# Many times an L2 cache. Small inputs would otherwise be read from it, and the bound is one of the memory.
COLD_BYTES = 1 << 30
MOST_READS = 16
# A GPU's queue holds about a thousand launches. Once it is full, a call waits for the device.
CALLS_AT_A_TIME = 10
HOST_CALLS = 200


class Clock:
    """Of a CPU."""

    warm_ups = 0
    """Runs before the first that is timed, besides the one in which an implementation compiles."""

    def seconds(self, call: Callable[[], object], host_s: float = 0.0) -> float:
        """How long the device needs for a call that keeps its caller for ``host_s``."""
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result  # freed after the time was taken
        return seconds

    def host_seconds(self, prepare: Callable[[], Callable[[], object]], limit: float) -> list[float]:
        """How long each of many calls keeps its caller, where that is another time than the device's.

        Args:
            prepare: makes one call ready, which is not timed.
            limit: the seconds after which no further call is made.
        """
        return []


class DeviceClock(Clock):
    """Of a GPU: events in its queue, and the host's clock for calls that nothing is waited for."""

    warm_ups = 2  # torch.compile records a CUDA graph in the second run, and replays it from the third on

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer = torch.zeros(COLD_BYTES // 4, device=device)
        self.read_s = math.inf
        self.read_s = min(self.seconds(self.read) for _ in range(3))

    def read(self) -> None:
        """Leaves nothing of other tensors in the caches, and nothing there that must be written back."""
        self.buffer.sum()

    def seconds(self, call: Callable[[], object], host_s: float = 0.0) -> float:
        """Between two events. The device reads until the host has launched all, so that it never waits for a launch.

        A call that waits for the device itself, or that launches more than a queue holds, has its gaps counted.
        """
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.compiler.cudagraph_mark_step_begin()
        synchronize(self.device)
        for _ in range(min(1 + int(2 * host_s / self.read_s), MOST_READS)):
            self.read()
        begin.record()
        result = call()
        end.record()
        synchronize(self.device)
        del result
        return begin.elapsed_time(end) / 1e3

    def host_seconds(self, prepare: Callable[[], Callable[[], object]], limit: float) -> list[float]:
        """A few calls one after another, then a wait until the queue is empty, and again."""
        found: list[float] = []
        until = time.perf_counter() + limit
        while not found or (len(found) < HOST_CALLS and time.perf_counter() < until):
            synchronize(self.device)
            for _ in range(CALLS_AT_A_TIME):
                call = prepare()
                torch.compiler.cudagraph_mark_step_begin()
                start = time.perf_counter()
                result = call()
                found.append(time.perf_counter() - start)
                del call, result
                if time.perf_counter() > until:
                    break
        synchronize(self.device)
        return found


@functools.cache
def of(device: torch.device) -> Clock:
    """The one clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else Clock()


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
