"""Times the tile shapes of the projection kernel on this GPU.

    python benchmarks/tune_triton.py    # prints the line for rlhf_kernels/triton/configurations.py, fastest shape first

Steps along D are left alone: they are part of the result's definition, the same on every GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
import triton
from triton.runtime.errors import OutOfResources

from rlhf_kernels.triton import configurations, linear_log_prob
from rlhf_kernels.triton.configurations import Projection

# Of the shape that the benchmark measures, a quarter of its rows.
ROWS, DEPTH, VOCABULARY = 2048, 4096, 128_256
SHOWN = 5


def candidates(shared_bytes: int) -> Iterator[Projection]:
    """Shapes whose operands fit into the shared memory of a block."""
    for rows, columns, warps, stages in itertools.product((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4, 5)):
        shape = replace(configurations.DEFAULT, rows=rows, columns=columns, warps=warps, stages=stages)
        accumulators = rows * columns // (32 * warps)  # registers of a thread
        if (rows + columns) * shape.depth * 2 * stages <= shared_bytes and accumulators <= 128:
            yield shape


def milliseconds(shape: Projection) -> float | None:
    """Of one forward with entropy; None where the kernel takes more than the GPU has."""
    device = torch.device("cuda")
    hidden = torch.randn(ROWS, DEPTH, device=device, dtype=torch.bfloat16)
    weight = torch.randn(VOCABULARY, DEPTH, device=device, dtype=torch.bfloat16) / DEPTH**0.5
    index = torch.randint(VOCABULARY, (ROWS,), device=device)
    wanted = torch.ones(ROWS, dtype=torch.bool, device=device)
    arguments = (hidden, weight, index, wanted, None, 1.0, None, True)
    with mock.patch.object(configurations, "projection", return_value=shape):
        try:
            return triton.testing.do_bench(lambda: linear_log_prob.linear_selective_log_softmax(*arguments))
        except OutOfResources:
            return None


def main() -> int:
    """Prints shapes in the order of their speed; returns the exit status."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU, which is what this measures", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    capability = torch.cuda.get_device_capability(0)
    found = []
    for shape in candidates(properties.shared_memory_per_block_optin):
        time = milliseconds(shape)
        if time is not None:
            found.append((time, shape))
            print(f"{time:8.3f} ms  {shape}", file=sys.stderr, flush=True)
    found.sort(key=lambda entry: entry[0])
    print(f"{properties.name}: N={ROWS} D={DEPTH} V={VOCABULARY} bfloat16, forward with entropy")
    for time, shape in found[:SHOWN]:
        print(f"{time:8.3f} ms  {capability}: {shape},")
    return 0


if __name__ == "__main__":
    sys.exit(main())
