"""log p_i = l_i/τ − logsumexp(l/τ) and H = logsumexp(l/τ) − Σ p·l/τ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.reference.common import upcast


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, wanted: Tensor, temperature: float, inplace_backward: bool, *, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and, when asked for, entropies of all rows; 0 for those not ``wanted``."""
    if inplace_backward:
        logits = _GradientOverLogits.apply(logits)
    # Masked rows become 0 before anything is computed, so whatever they hold, even NaN, reaches no result or gradient.
    scaled = torch.where(wanted[..., None], upcast(logits), 0.0) / temperature
    logprobs = scaled.log_softmax(-1)
    # On the CPU a bad index has raised IndexError before. On a GPU it gives NaN, and nothing is read out of bounds.
    valid = (index >= 0) & (index < logits.shape[-1])
    chosen = logprobs.gather(-1, torch.where(wanted & valid, index, 0).long()[..., None]).squeeze(-1)
    chosen = torch.where(wanted, torch.where(valid, chosen, torch.nan), 0.0)
    return chosen, torch.where(wanted, entropy(logprobs), 0.0) if with_entropy else None


def entropy(logprobs: Tensor) -> Tensor:
    """−Σ p·log p over the last dimension, where a banned token (log p = −inf) adds nothing."""
    finite = torch.where(logprobs == -torch.inf, 0.0, logprobs)
    return -(logprobs.exp() * finite).sum(-1)


class _GradientOverLogits(torch.autograd.Function):
    """The identity. Its backward writes the gradient over the logits' storage, and returns that."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.logits = logits.detach()
        ctx.written = False
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if ctx.written:
            raise RuntimeError(
                "inplace_backward: its gradient was written over the logits already; one backward pass only"
            )
        ctx.written = True
        return ctx.logits.copy_(gradient)
