"""Per-token KL penalties, their derivative, and the rewards made of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.triton.common import LARGEST_WHOLE_EXPONENT, blocks, dense, exponential, load_mask

BLOCK = 1024
# Below this distance exponential has e^x − 1 − x without cancellation: a little under ½·ln 2.
NEAR = tl.constexpr(0.34)


@triton.jit
def kl_estimate(logprob, ref, ESTIMATOR: tl.constexpr):
    """Schulman's estimators, with d = log π − log π_ref."""
    d = logprob - ref
    if ESTIMATOR == "k2":
        return d * d * 0.5
    elif ESTIMATOR == "k3":
        value, value_lost, less_line = exponential(-d)
        # What the rounding of d lost (Knuth's two-sum). It is meant for finite inputs; others take the last case.
        minus_ref = d - logprob
        lost = (logprob - (d - minus_ref)) - (ref + minus_ref)
        near = less_line - lost * (value - 1.0)
        # Further from 0, every step keeps what its rounding loses.
        line = 1.0 - d
        line_lost = -d - (line - 1.0)
        difference = value - line
        difference_lost = (value - difference) - line
        far = difference + (difference_lost + ((value_lost - value * lost) - line_lost))
        # At d = −∞ the estimate is ∞, and not ∞ − ∞.
        farthest = tl.where(d < 0, value, less_line)
        return tl.where(tl.abs(d) < NEAR, near, tl.where(tl.abs(d) < LARGEST_WHOLE_EXPONENT, far, farthest))
    elif ESTIMATOR == "abs":
        return tl.abs(d)
    else:
        return d


@triton.jit
def kl_slope(logprob, ref, ESTIMATOR: tl.constexpr):
    """The derivative of :func:`kl_estimate` in ``logprob``."""
    d = logprob - ref
    if ESTIMATOR == "k2":
        return d
    elif ESTIMATOR == "k3":
        value, lost, less_line = exponential(-d)
        return tl.where(tl.abs(d) < NEAR, d - less_line, (1.0 - value) - lost)  # 1 − e^(−d)
    elif ESTIMATOR == "abs":
        return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    else:
        return tl.full(d.shape, 1.0, tl.float32)


@triton.jit
def _penalty(
    logprobs,
    ref_logprobs,
    mask,
    gradient,
    result,
    size,
    ESTIMATOR: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    logprob = tl.load(logprobs + at, mask=here, other=0.0).to(tl.float32)
    ref = tl.load(ref_logprobs + at, mask=here, other=0.0).to(tl.float32)
    if DERIVATIVE:
        value = kl_slope(logprob, ref, ESTIMATOR) * tl.load(gradient + at, mask=here, other=0.0).to(tl.float32)
    else:
        value = kl_estimate(logprob, ref, ESTIMATOR)
    tl.store(result + at, tl.where(load_mask(mask, at, here), value, 0.0), mask=here)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str) -> Tensor:
    """One estimate per position, float32."""
    return _run(logprobs, ref_logprobs, mask, estimator, None)


def kl_penalty_backward(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str, gradient: Tensor
) -> Tensor:
    """The gradient of ``logprobs``, float32; that of ``ref_logprobs`` is its negative."""
    return _run(logprobs, ref_logprobs, mask, estimator, gradient)


def _run(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str, gradient: Tensor | None
) -> Tensor:
    result = torch.empty(logprobs.shape, device=logprobs.device)
    size = result.numel()
    if size:
        _penalty[(triton.cdiv(size, BLOCK),)](
            logprobs.contiguous(), ref_logprobs.contiguous(), dense(mask),
            logprobs if gradient is None else gradient.contiguous(), result, size, ESTIMATOR=estimator,
            DERIVATIVE=gradient is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return result


@triton.jit
def clipped_score(scores, sequence, score_clip, CLIP: tl.constexpr):
    """A completion's score within its limits; NaN stays."""
    score = tl.load(scores + sequence).to(tl.float32)
    if CLIP:
        score = tl.where(score > score_clip, score_clip, tl.where(score < -score_clip, -score_clip, score))
    return score


@triton.jit
def shaped(logprobs, ref_logprobs, at, counts, is_last, score, beta, ESTIMATOR: tl.constexpr):
    """Rewards and KL at positions ``at``, 0 where they do not count."""
    logprob = tl.load(logprobs + at, mask=counts, other=0.0).to(tl.float32)
    ref = tl.load(ref_logprobs + at, mask=counts, other=0.0).to(tl.float32)
    kl = tl.where(counts, kl_estimate(logprob, ref, ESTIMATOR), 0.0)
    return tl.where(is_last, score, 0.0) - beta * kl, kl


@triton.jit
def _rewards(
    scores, logprobs, ref_logprobs, mask, rewards, kls, length, beta, score_clip, ESTIMATOR: tl.constexpr,
    CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    base = sequence * length
    last = -1
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        counts = load_mask(mask, base + t, t < length)
        last = tl.maximum(last, tl.max(tl.where(counts, t, -1), 0))
    score = clipped_score(scores, sequence, score_clip, CLIP)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        here = t < length
        counts = load_mask(mask, base + t, here)
        reward, kl = shaped(logprobs, ref_logprobs, base + t, counts, t == last, score, beta, ESTIMATOR)
        tl.store(rewards + base + t, reward, mask=here)
        tl.store(kls + base + t, kl, mask=here)


def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, beta: float, estimator: str,
    score_clip: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rewards and per-token KL, both 0 where masked."""
    rewards, kl = (torch.empty(logprobs.shape, device=logprobs.device) for _ in range(2))
    count, length = logprobs.shape
    if rewards.numel():
        _rewards[(count,)](
            scores.contiguous(), logprobs.contiguous(), ref_logprobs.contiguous(), dense(mask), rewards, kl,
            length, beta, score_clip or 0.0, ESTIMATOR=estimator, CLIP=score_clip is not None,
            BLOCK=blocks(length, BLOCK),
        )  # fmt: skip
    return rewards, kl
