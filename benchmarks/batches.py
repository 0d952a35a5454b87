"""Random batches of completions, which the families share."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_mask(batch: int, length: int, generator: torch.Generator, *, holes: bool = True) -> Tensor:
    """(B, T) float32, as trainers hold their masks: completions of a quarter of T up to T tokens.

    With ``holes``, a tenth of the tokens are masked.
    """
    device = generator.device
    lengths = torch.randint(max(1, length // 4), length + 1, (batch, 1), generator=generator, device=device)
    mask = torch.arange(length, device=device) < lengths
    if holes:
        mask &= torch.rand(batch, length, generator=generator, device=device) > 0.1
    return mask.float()


def normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers with mean 0 and standard deviation ``scale``."""
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)


def log_probs(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probs of sampled tokens under two policies that are close to one another."""
    first = -normal(shape, generator, torch.float32).abs()
    return first.to(dtype), (first + normal(shape, generator, torch.float32, 0.1)).to(dtype)
