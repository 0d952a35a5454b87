"""Tile shapes of the one kernel whose speed hangs on them, by GPU generation.

Everything else here is bound by memory and takes one shape. The result does not depend on these: the chunks whose sums
are merged have a size of their own, and the sum over D runs in steps of ``depth``, which is one number for a dtype.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Projection:
    """Rows × columns of a tile of logits, in steps of ``depth`` along D."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    widen: bool = False  # to float32: the interpreter's product takes bfloat16 for integers


# By compute capability: Ampere (8.0, and 8.6 with less shared memory), Ada (8.9), Hopper (9.0), Blackwell (10.0, 12.0).
HALF = {
    (8, 0): Projection(128, 128, 64, 8, 3),
    (8, 6): Projection(128, 128, 64, 8, 2),
    (8, 9): Projection(128, 128, 64, 8, 2),
    (9, 0): Projection(128, 128, 64, 8, 4),
    (10, 0): Projection(128, 128, 64, 8, 4),
    (12, 0): Projection(128, 64, 64, 8, 2),
}
DEFAULT = Projection(128, 128, 64, 8, 2)
# float32 products are summed without tensor cores, which would round them to 10 bits.
SINGLE = Projection(64, 64, 16, 8, 2)
INTERPRETED = Projection(32, 256, 64, 4, 1, widen=True)


@functools.cache
def projection(device: torch.device, dtype: torch.dtype) -> Projection:
    """The tile for this GPU, whatever the number of rows: flatter ones take other instructions, and give other bits."""
    if device.type != "cuda":
        return INTERPRETED
    if dtype == torch.float32:
        return SINGLE
    return HALF.get(torch.cuda.get_device_capability(device), DEFAULT)
