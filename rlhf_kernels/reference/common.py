"""What the families share: the dtype to compute in, and packed sequences as rows padded to the longest."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(value: Tensor) -> Tensor:
    """The value in the dtype to compute in: float64 stays, everything else becomes float32."""
    return value if value.dtype == torch.float64 else value.float()


def common_dtype(*values: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float64 if one of the values is, float32 otherwise."""
    double = any(x is not None and x.dtype == torch.float64 for x in values)
    return torch.float64 if double else torch.float32


def slots_of(boundaries: Tensor) -> Tensor:
    """(B, T) bool: the entries of the padded form that the packed values fill, in order."""
    lengths = boundaries.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=boundaries.device) < lengths[:, None]


def pad(packed: Tensor, slots: Tensor) -> Tensor:
    """The padded form of packed values, with zeros as padding."""
    return torch.zeros(slots.shape, dtype=packed.dtype, device=packed.device).masked_scatter(slots, packed)
