"""r_t = −β·k(t) + [t is the last unmasked position]·score."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.reference.common import upcast


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, wanted: Tensor | None, estimator: str) -> Tensor:
    """Schulman's estimators, with d = log π − log π_ref; 0 where masked."""
    logprobs, ref_logprobs = upcast(logprobs), upcast(ref_logprobs)
    if wanted is not None:
        logprobs, ref_logprobs = (torch.where(wanted, x, 0.0) for x in (logprobs, ref_logprobs))
    d = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1(-d) + d.clamp(min=-1e4)  # so that d = −∞ gives ∞, not ∞ − ∞
        case _:
            return d.abs()


@torch.no_grad()
def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, wanted: Tensor, beta: float, estimator: str,
    score_clip: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rewards and per-token KL, both 0 where masked."""
    kl = kl_penalty(logprobs, ref_logprobs, wanted, estimator)
    score = upcast(scores) if score_clip is None else upcast(scores).clamp(-score_clip, score_clip)
    # A position is the last one if it counts and none after it does.
    remaining = wanted.flip(1).cumsum(1).flip(1)
    last = wanted & (remaining == 1)
    return torch.where(last, score[:, None], 0.0) - beta * kl, kl
