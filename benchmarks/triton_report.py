"""Compiles every Triton kernel, and prints its registers, spills and shared memory. Needs no GPU.

    python benchmarks/triton_report.py              # Ampere, Hopper and both Blackwells
    python benchmarks/triton_report.py --arch 90    # Hopper alone

The ops are called on CPU tensors, and their launches are recorded and then compiled. So the kernels have the argument
types, alignments and block sizes that a GPU would be given. Exits with 1 where a kernel spills registers.
"""

from __future__ import annotations

import argparse
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
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rlhf_kernels.triton import OPS

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
    """The launches that :func:`calls` leads to, in order and each once."""
    found: dict[Launch, None] = {}

    def record(kernel: JITFunction[Any], *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found[_launch(kernel, values, named)] = None

    with mock.patch.object(JITFunction, "run", record):
        for name, arguments in calls():
            OPS[name](*arguments)
    return list(found)


def _launch(kernel: JITFunction[Any], values: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    names = [p.name for p in kernel.params]
    options = {k: v for k, v in named.items() if k not in names}
    bound = dict(zip(names, values, strict=False)) | {k: v for k, v in named.items() if k in names}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        value = bound[parameter.name]
        if parameter.is_constexpr:
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


def calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of every op, in the dtypes of training, with most of the options that lead to kernels of their own."""
    rows, vocabulary, depth, batch, length = 64, 50304, 128, 8, 4096
    index = torch.zeros(rows, dtype=torch.int64)
    wanted = torch.ones(rows, dtype=torch.bool)
    per_row = torch.ones(rows)
    nothing = torch.empty(0)
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.zeros(rows, vocabulary, dtype=dtype)
        hidden, weight = torch.zeros(rows, depth, dtype=dtype), torch.zeros(vocabulary, depth, dtype=dtype)
        bias = torch.zeros(vocabulary, dtype=dtype)
        for entropy in (False, True):
            gradient_of_entropy = per_row if entropy else None
            yield "selective_log_softmax", (logits, index, wanted, 1.0, entropy, False)
            saved = (per_row if entropy else nothing, per_row, per_row, per_row, gradient_of_entropy)
            yield "selective_log_softmax_backward", (logits, index, wanted, 1.0, *saved)
            yield "selective_log_softmax_backward_", (logits, index, wanted, 1.0, *saved)
            for b, cap in ((None, None), (bias, 30.0)):
                yield "linear_selective_log_softmax", (hidden, weight, index, wanted, b, 1.0, cap, entropy)
        yield "linear_selective_log_softmax_backward", (
            hidden, weight, index, wanted, None, 1.0, None, nothing, per_row, per_row, per_row, None, True, True
        )  # fmt: skip
        for cap in (None, 30.0):
            yield "linear_cross_entropy", (hidden, weight, index, wanted, None, 1.0, cap, True, True, True)
            yield "linear_ppo_policy_loss", (
                hidden, weight, index, per_row, per_row, wanted, None, 1.0, cap, 0.2, 0.2, 3.0, "token-mean", True, True
            )  # fmt: skip
    tokens = torch.zeros(batch, length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    scores = torch.zeros(batch)
    boundaries = torch.arange(0, batch * length + 1, length)
    for estimator in ("k1", "k2", "k3", "abs"):
        yield "kl_penalty", (tokens, tokens, estimator)
        yield "kl_penalty_backward", (tokens, tokens, estimator, tokens)
        yield "kl_shaped_rewards", (scores, tokens, tokens, mask, 0.1, estimator, 5.0)
        yield "ppo_advantages", (
            scores, tokens, tokens, tokens, mask, 0.1, 1.0, 0.95, True, None, estimator, 5.0, None
        )  # fmt: skip
    flat, flat_mask = tokens.view(-1), mask.view(-1)
    yield "masked_gae", (tokens, tokens, mask, 1.0, 0.95, scores, True, None)
    yield "masked_gae", (flat, flat, flat_mask, 1.0, 0.95, None, True, boundaries)
    for reduction in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        yield "ppo_policy_loss", (tokens, tokens, tokens, mask, 0.2, 0.2, 3.0, reduction, True)
        yield "ppo_value_loss", (tokens, tokens, tokens, mask, 0.2, reduction, True)
    ranks = torch.zeros(64, 9, dtype=torch.int64)
    completions = torch.zeros(64, 9)
    yield "pairwise_ranking_loss", (completions, ranks, None, ranks == 0, 0.0, True)
    offsets = torch.arange(0, 64 * 9 + 1, 9)
    yield "pairwise_ranking_loss", (completions.view(-1), ranks.view(-1), offsets, (ranks == 0).view(-1), 0.0, True)


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
