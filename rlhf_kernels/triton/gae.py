"""GAE as an associative scan from the end of every sequence, in blocks with a carry; whitening in a second launch.

A_t = δ_t + γλ·A_(t+1) is a composition of the maps x ↦ δ_t + γλ·x, which a scan may group in any way (Blelloch 1990). A
masked position is the identity. V_(t+1), the value of the next position that counts, is found by a second scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.reference.gae import VARIANCE_EPS
from rlhf_kernels.triton.common import blocks, dense, load_mask, span, two_floats
from rlhf_kernels.triton.kl_reward import clipped_score, shaped

BLOCK = 1024
WHITEN_BLOCK = 2048


@triton.jit
def _compose(right_slope, right_offset, slope, offset):
    """The composition of two maps: first the one of the positions to the right, then the one of this position."""
    return right_slope * slope, offset + slope * right_offset


@triton.jit
def _nearest(right_exists, right_value, exists, value):
    return right_exists | exists, tl.where(exists != 0, value, right_value)


@triton.jit
def _sequences(
    rewards, values, mask, bootstrap, boundaries, scores, logprobs, ref_logprobs, advantages, returns, kls, moments,
    length, gamma, gamma_lost, decay, decay_lost, beta, score_clip, BOOTSTRAP: tl.constexpr, PACKED: tl.constexpr,
    SHAPE: tl.constexpr, ESTIMATOR: tl.constexpr, CLIP: tl.constexpr, MOMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, from its last block to its first. SHAPE makes the rewards from score and KL, and stores both."""
    sequence = tl.program_id(0).to(tl.int64)
    base, length = span(sequence, boundaries, length, PACKED)
    next_value = 0.0
    if BOOTSTRAP:
        next_value = tl.load(bootstrap + sequence).to(tl.float32)
    score = 0.0
    if SHAPE:
        score = clipped_score(scores, sequence, score_clip, CLIP)
    # In float64: in float32 the scan would round more often than the loop that it replaces.
    gamma = tl.cast(gamma, tl.float64) + gamma_lost
    decay = tl.cast(decay, tl.float64) + decay_lost
    advantage = tl.cast(0.0, tl.float64)
    seen = 0  # whether any position to the right counts
    number = tl.cast(0.0, tl.float64)
    mean = tl.cast(0.0, tl.float64)
    squares = tl.cast(0.0, tl.float64)
    count = tl.cdiv(length, BLOCK)
    for block in range(count):
        start = (count - 1 - block) * BLOCK
        t = start + tl.arange(0, BLOCK)
        here = t < length
        counts = load_mask(mask, base + t, here)
        value = tl.load(values + base + t, mask=counts, other=0.0).to(tl.float32)
        # Shifted by one, so that the scan gives each position the next value strictly to its right in this block.
        right = (tl.arange(0, BLOCK) < BLOCK - 1) & (t + 1 < length)
        right_counts = load_mask(mask, base + t + 1, right)
        right_value = tl.load(values + base + t + 1, mask=right_counts, other=0.0).to(tl.float32)
        exists, following = tl.associative_scan((right_counts.to(tl.int32), right_value), 0, _nearest, reverse=True)
        following = tl.where(exists != 0, following, next_value)
        if SHAPE:
            is_last = counts & (exists == 0) & (seen == 0)
            reward, kl = shaped(logprobs, ref_logprobs, base + t, counts, is_last, score, beta, ESTIMATOR)
            tl.store(rewards + base + t, reward, mask=here)
            tl.store(kls + base + t, kl, mask=here)
        else:
            reward = tl.load(rewards + base + t, mask=counts, other=0.0).to(tl.float32)
        offset = tl.where(counts, reward + gamma * following - value, 0.0)
        slope = tl.where(counts, decay, 1.0)
        slope, offset = tl.associative_scan((slope, offset), 0, _compose, reverse=True)
        found = offset + slope * advantage
        result = tl.where(counts, found, 0.0).to(tl.float32)
        tl.store(advantages + base + t, result, mask=here)
        tl.store(returns + base + t, tl.where(counts, found + value, 0.0).to(tl.float32), mask=here)
        # Carried to the block on the left: the advantage at the first position, and the first value that counts.
        first = tl.arange(0, BLOCK) == 0
        advantage = tl.sum(tl.where(first, found, 0.0), 0)
        some = tl.max(counts.to(tl.int32), 0)
        leftmost = tl.min(tl.where(counts, t, length), 0)
        next_value = tl.where(some != 0, tl.sum(tl.where(counts & (t == leftmost), value, 0.0), 0), next_value)
        seen = seen | some
        if MOMENTS:  # pooled as in Chan et al. 1979
            here_number = tl.sum(counts.to(tl.float64), 0)
            here_mean = tl.sum(result.to(tl.float64), 0) / tl.maximum(here_number, 1.0)
            distance = tl.where(counts, result.to(tl.float64) - here_mean, 0.0)
            pooled = tl.maximum(number + here_number, 1.0)
            gap = here_mean - mean
            squares = squares + tl.sum(distance * distance, 0) + gap * gap * number * here_number / pooled
            mean = mean + gap * here_number / pooled
            number = number + here_number
    if MOMENTS:
        tl.store(moments + sequence * 3, number)
        tl.store(moments + sequence * 3 + 1, mean)
        tl.store(moments + sequence * 3 + 2, squares)


@triton.jit
def _whiten(
    advantages, mask, moments, sequences, size, epsilon, UNBIASED: tl.constexpr, BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Whitens a block. Every program pools the moments of all sequences itself, always in the same order."""
    total = tl.cast(0.0, tl.float64)
    weighted = tl.cast(0.0, tl.float64)
    for start in range(0, sequences, SEQUENCES):
        s = start + tl.arange(0, SEQUENCES)
        number = tl.load(moments + s * 3, mask=s < sequences, other=0.0)
        weighted = weighted + tl.sum(number * tl.load(moments + s * 3 + 1, mask=s < sequences, other=0.0), 0)
        total = total + tl.sum(number, 0)
    mean = weighted / tl.maximum(total, 1.0)
    squares = tl.cast(0.0, tl.float64)
    for start in range(0, sequences, SEQUENCES):
        s = start + tl.arange(0, SEQUENCES)
        number = tl.load(moments + s * 3, mask=s < sequences, other=0.0)
        gap = tl.where(number > 0, tl.load(moments + s * 3 + 1, mask=s < sequences, other=0.0) - mean, 0.0)
        squares = squares + tl.sum(tl.load(moments + s * 3 + 2, mask=s < sequences, other=0.0) + number * gap * gap, 0)
    degrees = total - 1.0 if UNBIASED else total
    scale = 1.0 / tl.sqrt(squares / tl.maximum(degrees, 1.0) + epsilon)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    counts = load_mask(mask, at, here)
    value = tl.load(advantages + at, mask=here, other=0.0).to(tl.float64)
    tl.store(advantages + at, tl.where(counts, (value - mean) * scale, 0.0).to(tl.float32), mask=here)


def masked_gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: float, lam: float, bootstrap: Tensor | None,
    whiten: str | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and returns, 0 where masked."""
    return _run(rewards.contiguous(), None, values, mask, gamma, lam, bootstrap, whiten, cu_seqlens, None)


def ppo_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor | None, beta: float,
    gamma: float, lam: float, whiten: str | None, bootstrap: Tensor | None, estimator: str, score_clip: float | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Advantages, returns, rewards and KL, 0 where masked."""
    rewards, kl = (torch.empty(values.shape, device=values.device) for _ in range(2))
    shaping = (scores.contiguous(), logprobs.contiguous(), ref_logprobs.contiguous(), beta, estimator, score_clip)
    advantages, returns = _run(rewards, kl, values, mask, gamma, lam, bootstrap, whiten, cu_seqlens, shaping)
    return advantages, returns, rewards, kl


def _run(
    rewards: Tensor, kl: Tensor | None, values: Tensor, mask: Tensor | None, gamma: float, lam: float,
    bootstrap: Tensor | None, whiten: str | None, cu_seqlens: Tensor | None,
    shaping: tuple[Tensor, Tensor, Tensor, float, str, float | None] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    values, mask = values.contiguous(), dense(mask)
    advantages, returns = (torch.empty(values.shape, device=values.device) for _ in range(2))
    packed = cu_seqlens is not None
    count = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else values.shape[0]
    length = 0 if packed else values.shape[1]
    if count == 0 or values.numel() == 0:
        return advantages, returns
    scores, logprobs, ref_logprobs, beta, estimator, score_clip = shaping or (values, values, values, 0.0, "k1", None)
    moments = torch.empty(count * 3 if whiten else 0, dtype=torch.float64, device=values.device)
    _sequences[(count,)](
        rewards, values, mask, values if bootstrap is None else bootstrap.contiguous(),
        values if cu_seqlens is None else cu_seqlens.contiguous(), scores, logprobs, ref_logprobs, advantages, returns,
        returns if kl is None else kl, moments, length, *two_floats(gamma), *two_floats(gamma * lam), beta,
        score_clip or 0.0, BOOTSTRAP=bootstrap is not None, PACKED=packed, SHAPE=shaping is not None,
        ESTIMATOR=estimator, CLIP=score_clip is not None, MOMENTS=whiten is not None,
        BLOCK=BLOCK if packed else blocks(length, BLOCK),
    )  # fmt: skip
    if whiten:
        size = values.numel()
        _whiten[(triton.cdiv(size, WHITEN_BLOCK),)](
            advantages, mask, moments, count, size, VARIANCE_EPS, UNBIASED=whiten == "unbiased", BLOCK=WHITEN_BLOCK,
            SEQUENCES=blocks(count, 1024),
        )  # fmt: skip
    return advantages, returns
