"""What the functions of several libraries have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.log_prob import selective_log_softmax_and_entropy
from rlhf_kernels.ranking_loss import pairwise_ranking_loss


def are_plain(logits: Any, index: Tensor | None = None) -> bool:
    """Whether our ops take these logits, with one index a row."""
    plain = type(logits) in (Tensor, torch.nn.Parameter) and logits.dtype in checks.FLOATS and logits.dim() > 0
    return plain and (index is None or index.shape == logits.shape[:-1])


def entropies(logits: Tensor) -> Tensor:
    """(...) entropies of (..., V) logits, float32 (float64 for float64 logits)."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return selective_log_softmax_and_entropy(logits, index)[1]


def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The mean of −log σ(chosen − rejected) over pairs, in the dtype of ``chosen``."""
    scores = torch.stack([chosen.flatten(), rejected.flatten()], -1)
    ranks = torch.arange(2, device=scores.device).expand(scores.shape)
    return pairwise_ranking_loss(scores, ranks)[0].to(chosen.dtype)


def divided_by(number: Any, by_token: bool) -> dict[str, Any]:
    """The options of a loss that its caller divides by ``number``, if there is one: tokens, or completions.

    Trainers hold the number of all their processes as a tensor on the GPU, which an option can't be without waiting.
    """
    if by_token:
        return {"reduction": "token-mean" if number is None else "token-sum"}
    return {"reduction": "seq-mean-token-mean", "denominator": None if number is None else 1.0}


def fold_scale(softcap: float | None, scale: float) -> tuple[float | None, float]:
    """The softcap and the temperature that do what a factor s before a cap c does: c/s and 1/s."""
    return (None if softcap is None else softcap / scale), 1.0 / scale
