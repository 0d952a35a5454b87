"""What the families share: the dtype computed in, and packed values as rows padded to the longest."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(value: Tensor) -> Tensor:
    """The dtype that is computed in: float32 at least."""
    return value if value.dtype == torch.float64 else value.float()


def common_dtype(*values: Tensor | None) -> torch.dtype:
    """What all of them are computed in: float64 if one of them is, float32 otherwise."""
    double = any(x is not None and x.dtype == torch.float64 for x in values)
    return torch.float64 if double else torch.float32


def slots_of(boundaries: Tensor) -> Tensor:
    """(B, T) bool: which entries of the padded form the packed ones fill, in order."""
    lengths = boundaries.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=boundaries.device) < lengths[:, None]


def pad(packed: Tensor, slots: Tensor) -> Tensor:
    """The padded form of packed values, with zeros in between."""
    return torch.zeros(slots.shape, dtype=packed.dtype, device=packed.device).masked_scatter(slots, packed)
