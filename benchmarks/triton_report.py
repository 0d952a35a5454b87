"""Compiles every Triton kernel, and prints its registers, spills and shared memory. Needs no GPU.

    python benchmarks/triton_report.py              # Ampere, Hopper and both Blackwells
    python benchmarks/triton_report.py --arch 90    # Hopper alone

The ops are called on CPU tensors, and their launches are recorded and then compiled. So the kernels have the argument
types, alignments and block sizes that a GPU would be given. Exits with 1 where a kernel spills registers.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rlhf_kernels import backends, checks
from rlhf_kernels.ops import FAMILIES

ARCHITECTURES = (80, 90, 100, 120)
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel with the argument types, constants, alignments and options of one launch."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs: registers per thread, bytes spilled, and bytes of shared memory per block."""

    registers: int
    spilled: int
    shared: int


def launches() -> list[Launch]:
    """Those that the families' variants make, with their derivatives; each once, in order."""
    found: dict[Launch, None] = {}

    def record(kernel: JITFunction[Any], *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found[_launch(kernel, values, named)] = None

    # The ops believe that Triton's interpreter is there, and so take CPU tensors. Nothing is written to these: drawn
    # tokens are what the memory held before.
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(checks, "read_drawn", lambda backend, tokens: tokens),
        mock.patch.object(backends, "_INTERPRETED_TRITON", True),
        backends.use_backend("triton"),
    ):
        for family in FAMILIES:
            for call in importlib.import_module(family).variants():
                results = [x for x in tree_leaves(call()) if x.requires_grad]
                if results:
                    torch.autograd.backward([x.sum() for x in results])
    return list(found)


def _launch(kernel: JITFunction[Any], values: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    names = [p.name for p in kernel.params]
    options = {k: v for k, v in named.items() if k not in names}
    bound = dict(zip(names, values, strict=False)) | {k: v for k, v in named.items() if k in names}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned.append(parameter.name)
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(parameter.name)
        else:
            signature[parameter.name] = "fp32"
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(options.items()))


def compiled(launch: Launch, architecture: int) -> Usage:
    """Compiles one launch, down to machine code."""
    names = [name for name, _ in launch.signature]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))
    assembler = get_ptxas(architecture).path
    ptx = result.asm["ptx"]
    target = re.search(r"\.target (\S+?)[\s,]", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [assembler, "-v", f"-arch={target.group(1)}", str(file), "-o", str(file.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return Usage(int(registers.group(1)) if registers else 0, spilled, result.metadata.shared)


def report(architecture: int) -> Iterator[tuple[str, Usage]]:
    """Every kernel, named by its file, its name and what tells its variants apart."""
    for launch in launches():
        family = launch.kernel.__module__.rpartition(".")[2]
        types = sorted({kind[1:] for _, kind in launch.signature if kind.startswith("*")} & {"bf16", "fp32"})
        flags = [f"{k}={v}" for k, v in launch.constants if isinstance(v, str) or (isinstance(v, bool) and v)]
        name = " ".join((f"{family}.{launch.kernel.__name__}", "/".join(types), *flags))
        yield name, compiled(launch, architecture)


def main() -> int:
    """Prints one line per kernel and architecture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="repeatable; default: all")
    spilled = 0
    for architecture in parser.parse_args().arch or ARCHITECTURES:
        print(f"\nsm_{architecture}{'registers':>64}{'spilled':>9}{'shared':>9}")
        for name, usage in report(architecture):
            print(f"{name:<69}{usage.registers:>9}{usage.spilled:>9}{usage.shared:>9}", flush=True)
            spilled += usage.spilled > 0
    print(f"\n{spilled} kernels spill registers" if spilled else "\nno kernel spills registers")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
