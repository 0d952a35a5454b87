"""loss = mean over prompts of −1/|pairs| Σ log σ(r_w − r_l)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.reference.common import pad, slots_of, upcast
from rlhf_kernels.reference.ppo_loss import masked_mean


def pairwise_ranking_loss(
    scores: Tensor, ranks: Tensor, offsets: Tensor | None, wanted: Tensor | None, margin: float
) -> tuple[Tensor, Tensor]:
    """The loss and the accuracy."""
    if offsets is not None:
        wanted = slots_of(offsets)
        scores, ranks = pad(scores, wanted), pad(ranks, wanted)
    elif wanted is None:
        wanted = torch.ones_like(ranks, dtype=torch.bool)
    scores = torch.where(wanted, upcast(scores), 0.0)
    # [b, w, l]: completion w of prompt b is ranked better than completion l.
    pairs = (ranks[:, :, None] < ranks[:, None, :]) & wanted[:, :, None] & wanted[:, None, :]
    difference = torch.where(pairs, scores[:, :, None] - scores[:, None, :], 0.0)
    counts = pairs.sum((1, 2))
    losses = torch.where(pairs, -torch.nn.functional.logsigmoid(difference - margin), 0.0).sum((1, 2))
    right = torch.where(pairs, (difference.sign() + 1) / 2, 0.0).sum((1, 2)).detach()
    some = counts.clamp(min=1)
    return masked_mean(losses / some, counts > 0), masked_mean(right / some, counts > 0)
