"""loss = mean over prompts of −1/|pairs| Σ log σ(r_w − r_l − m)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.reference.common import pad, slots_of, upcast
from rlhf_kernels.reference.ppo_loss import masked_mean


def pairwise_ranking_loss(
    scores: Tensor, ranks: Tensor, offsets: Tensor | None, wanted: Tensor | None, margin: float
) -> tuple[Tensor, Tensor]:
    """The loss and the accuracy."""
    if offsets is not None:
        loss, accuracy = _flat(scores, ranks, offsets, margin)
    else:
        loss, accuracy = _rows(scores, ranks, wanted, margin)
    return loss, accuracy.detach()


def _rows(scores: Tensor, ranks: Tensor, wanted: Tensor | None, margin: float) -> tuple[Tensor, Tensor]:
    pairs, difference = _pairs(scores, ranks, wanted)
    counts = pairs.sum((1, 2))
    some = counts.clamp(min=1)
    losses = torch.where(pairs, -torch.nn.functional.logsigmoid(difference - margin), 0.0).sum((1, 2))
    right = torch.where(pairs, (difference.sign() + 1) / 2, 0.0).sum((1, 2))
    return masked_mean(losses / some, counts > 0), masked_mean(right / some, counts > 0)


def _pairs(scores: Tensor, ranks: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, K, K): whether completion w of prompt b is ranked better than completion l, and r_w − r_l where it is."""
    if wanted is None:
        wanted = torch.ones_like(ranks, dtype=torch.bool)
    scores = torch.where(wanted, upcast(scores), 0.0)
    pairs = (ranks[:, :, None] < ranks[:, None, :]) & wanted[:, :, None] & wanted[:, None, :]
    return pairs, torch.where(pairs, scores[:, :, None] - scores[:, None, :], 0.0)


# Flat scores are padded to the longest prompt. That size depends on the data, so no compiler can trace it, and the loss
# and its gradient are two ops instead. A pair adds −σ(m − (r_w − r_l))/|pairs| to the gradient of w, and subtracts it
# from that of l.
@torch.library.custom_op("rlhf_kernels::reference_flat_ranking_loss", mutates_args=())
def _flat(scores: Tensor, ranks: Tensor, offsets: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    slots = slots_of(offsets)
    return _rows(pad(scores, slots), pad(ranks, slots), slots, margin)


@torch.library.custom_op("rlhf_kernels::reference_flat_ranking_loss_backward", mutates_args=())
def _flat_gradient(scores: Tensor, ranks: Tensor, offsets: Tensor, margin: float) -> Tensor:
    slots = slots_of(offsets)
    pairs, difference = _pairs(pad(scores, slots), pad(ranks, slots), slots)
    counts = pairs.sum((1, 2))
    slope = torch.where(pairs, -torch.sigmoid(margin - difference), 0.0) / counts.clamp(min=1)[:, None, None]
    return ((slope.sum(2) - slope.sum(1)) / (counts > 0).sum().clamp(min=1))[slots]


@_flat.register_fake
def _(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return upcast(scores).new_empty(()), upcast(scores).new_empty(())


@_flat_gradient.register_fake
def _(scores: Tensor, *_: Any) -> Tensor:
    return upcast(scores).new_empty(scores.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.margin = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    scores, *others = ctx.saved_tensors
    return (gradient * _flat_gradient(scores, *others, ctx.margin)).to(scores.dtype), None, None, None


_flat.register_autograd(_backward, setup_context=_save)
