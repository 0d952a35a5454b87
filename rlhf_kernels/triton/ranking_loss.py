"""The pairwise ranking loss: a prompt to a program, its pairs in registers, tile by tile where it has many completions.

The gradient lacks a factor at first, one over the number of prompts that have a pair, which a second launch puts in
with the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.triton.common import blocks, exponential, span

TILE = 32
BLOCK = 1024


@triton.jit
def _tile(scores, ranks, wanted, base, start, length, MASKED: tl.constexpr, TILE: tl.constexpr):
    i = start + tl.arange(0, TILE)
    here = i < length
    exists = here
    if MASKED:
        exists = here & (tl.load(wanted + base + i, mask=here, other=0) != 0)
    score = tl.load(scores + base + i, mask=exists, other=0.0).to(tl.float32)
    return i, here, exists, score, tl.load(ranks + base + i, mask=here, other=0)


@triton.jit
def _prompts(
    scores, ranks, wanted, boundaries, gradient, results, length, margin, FLAT: tl.constexpr, MASKED: tl.constexpr,
    GRADIENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    prompt = tl.program_id(0).to(tl.int64)
    base, length = span(prompt, boundaries, length, FLAT)
    pairs = tl.cast(0.0, tl.float64)
    loss = tl.cast(0.0, tl.float64)
    right = tl.cast(0.0, tl.float64)
    for start in range(0, length, TILE):
        i, here, i_exists, score_i, rank_i = _tile(scores, ranks, wanted, base, start, length, MASKED, TILE)
        slopes = tl.zeros([TILE], tl.float64)
        for other in range(0, length, TILE):
            _, _, j_exists, score_j, rank_j = _tile(scores, ranks, wanted, base, other, length, MASKED, TILE)
            both = i_exists[:, None] & j_exists[None, :]
            better = both & (rank_i[:, None] < rank_j[None, :])
            worse = both & (rank_i[:, None] > rank_j[None, :])
            difference = score_i[:, None] - score_j[None, :]
            # Of the pair in its own order: the winner's score less the loser's.
            x = tl.where(worse, -difference, difference) - margin
            small, _, _ = exponential(-tl.abs(x))
            # log(1 + u) as 2·artanh(u/(2 + u)), which keeps the digits of a small u.
            s = tl.div_rn(small, small + 2.0)
            square = s * s
            series = square * 0.1408732831478119 + 0.1398070901632309
            series = series * square + 0.20012426376342773
            series = series * square + 0.3333315849304199
            series = series * square + 1.0
            term = tl.where(x < 0, -x, 0.0) + 2.0 * s * series
            term = tl.where(x == x, term, x)
            loss += tl.sum(tl.sum(tl.where(better, term, 0.0).to(tl.float64), 1), 0)
            pairs += tl.sum(tl.sum(better.to(tl.float64), 1), 0)
            order = tl.where(difference > 0, 1.0, tl.where(difference < 0, 0.0, 0.5))
            right += tl.sum(tl.sum(tl.where(better, order, 0.0).to(tl.float64), 1), 0)
            if GRADIENT:
                # σ(−x), from the exponential that does not overflow.
                sigmoid = tl.div_rn(tl.where(x < 0, 1.0, small), 1.0 + small)
                sigmoid = tl.where(x == x, sigmoid, x)
                slopes += tl.sum((tl.where(worse, sigmoid, 0.0) - tl.where(better, sigmoid, 0.0)).to(tl.float64), 1)
        if GRADIENT:
            tl.store(gradient + base + i, slopes.to(tl.float32), mask=here)
    share = 1.0 / tl.maximum(pairs, 1.0)
    tl.store(results + prompt * 3, (loss * share).to(tl.float32))
    tl.store(results + prompt * 3 + 1, (right * share).to(tl.float32))
    tl.store(results + prompt * 3 + 2, pairs.to(tl.float32))


@triton.jit
def _finish(
    gradient, results, boundaries, loss, accuracy, prompts, length, FLAT: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Every program counts the prompts that have a pair, in one order; the first writes the means."""
    prompt = tl.program_id(0).to(tl.int64)
    number = tl.cast(0.0, tl.float64)
    losses = tl.cast(0.0, tl.float64)
    right = tl.cast(0.0, tl.float64)
    for start in range(0, prompts, BLOCK):
        p = start + tl.arange(0, BLOCK)
        here = p < prompts
        number += tl.sum((tl.load(results + p * 3 + 2, mask=here, other=0.0) > 0).to(tl.float64), 0)
        if prompt == 0:
            losses += tl.sum(tl.load(results + p * 3, mask=here, other=0.0).to(tl.float64), 0)
            right += tl.sum(tl.load(results + p * 3 + 1, mask=here, other=0.0).to(tl.float64), 0)
    share = 1.0 / tl.maximum(number, 1.0)
    if prompt == 0:
        tl.store(loss, (losses * share).to(tl.float32))
        tl.store(accuracy, (right * share).to(tl.float32))
    if GRADIENT:
        base, length = span(prompt, boundaries, length, FLAT)
        factor = (share / tl.maximum(tl.load(results + prompt * 3 + 2).to(tl.float64), 1.0)).to(tl.float32)
        for start in range(0, length, TILE):
            at = start + tl.arange(0, TILE)
            here = at < length
            tl.store(gradient + base + at, tl.load(gradient + base + at, mask=here, other=0.0) * factor, mask=here)


def pairwise_ranking_loss(
    scores: Tensor, ranks: Tensor, offsets: Tensor | None, wanted: Tensor | None, margin: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, accuracy, and the gradient of ``scores`` (empty if not asked for)."""
    device = scores.device
    scores, ranks = scores.contiguous(), ranks.contiguous()
    exist = scores if wanted is None else wanted.contiguous()
    gradient = torch.empty(scores.shape if with_gradient else 0, device=device)
    loss, accuracy = torch.zeros(2, device=device).unbind()
    flat = offsets is not None
    prompts = offsets.shape[0] - 1 if offsets is not None else scores.shape[0]
    if prompts == 0 or scores.numel() == 0:
        return loss, accuracy, gradient
    length = 0 if flat else scores.shape[1]
    tile = 16 if flat else max(2, blocks(length, TILE))
    results = torch.empty(prompts * 3, device=device)
    boundaries = ranks if offsets is None else offsets.contiguous()
    _prompts[(prompts,)](
        scores, ranks, exist, boundaries, gradient, results, length, margin, FLAT=flat, MASKED=wanted is not None,
        GRADIENT=with_gradient, TILE=tile, num_warps=1 if tile <= 16 else 4,
    )  # fmt: skip
    _finish[(prompts if with_gradient else 1,)](
        gradient, results, boundaries, loss, accuracy, prompts, length, FLAT=flat, GRADIENT=with_gradient, BLOCK=BLOCK,
        TILE=tile, num_warps=1,
    )  # fmt: skip
    return loss, accuracy, gradient
