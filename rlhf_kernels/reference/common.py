"""What several families share."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def clean(tensor: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype to compute in, with 0 in place of whatever stands at masked positions.

    Garbage has to go before the arithmetic and not after: the gradient of NaN times 0 is NaN.
    """
    tensor = tensor.to(dtype)
    return tensor if mask is None else torch.where(mask, tensor, 0.0)


def masked_mean(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over unmasked positions; 0 where there is none."""
    if mask is None:
        return tensor.sum() / max(tensor.numel(), 1)
    return torch.where(mask, tensor, 0.0).sum() / mask.sum().clamp(min=1)


def unpack(offsets: Tensor, total: int) -> Tensor:
    """Which cells of a (sequences, longest) rectangle the sequences laid end to end fill, as a bool tensor.

    ``rectangle.masked_scatter(cells, flat)`` lays a flat tensor out, ``rectangle[cells]`` takes it back.
    """
    lengths = offsets.diff()
    # The longest sequence is a value, and a compiler can't wait for one: there the bound on it has to do.
    longest = total if torch.compiler.is_compiling() or len(lengths) == 0 else int(lengths.max())
    return torch.arange(longest, device=offsets.device) < lengths[:, None]
