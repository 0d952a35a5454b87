"""The pairwise ranking loss, a prompt at a time. Its pairs are in registers, in tiles if it has many completions.

The first launch leaves out a factor of the gradient: one over the number of prompts that have a pair. The second launch
multiplies by it, and writes the means.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.triton.common import blocks, dense, exponential, load_mask, span

TILE = 32
BLOCK = 1024
# How many programs share the prompts: as many on every GPU, so that the sums have the same bits on all of them.
PROGRAMS = 1024


@triton.jit
def _tile(scores, ranks, mask, base, start, length, TILE: tl.constexpr):
    i = start + tl.arange(0, TILE)
    here = i < length
    exists = load_mask(mask, base + i, here)
    score = tl.load(scores + base + i, mask=exists, other=0.0).to(tl.float32)
    return i, here, exists, score, tl.load(ranks + base + i, mask=here, other=0)


@triton.jit
def _prompt(
    scores, ranks, mask, boundaries, gradient, prompt, length, margin, FLAT: tl.constexpr, GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The mean loss and accuracy of a prompt's pairs, and whether it has any. Stores the gradient of that loss."""
    base, length = span(prompt, boundaries, length, FLAT)
    pairs = tl.cast(0.0, tl.float64)
    loss = tl.cast(0.0, tl.float64)
    right = tl.cast(0.0, tl.float64)
    for start in range(0, length, TILE):
        i, here, i_exists, score_i, rank_i = _tile(scores, ranks, mask, base, start, length, TILE)
        slopes = tl.zeros([TILE], tl.float64)
        for other in range(0, length, TILE):
            _, _, j_exists, score_j, rank_j = _tile(scores, ranks, mask, base, other, length, TILE)
            both = i_exists[:, None] & j_exists[None, :]
            better = both & (rank_i[:, None] < rank_j[None, :])
            worse = both & (rank_i[:, None] > rank_j[None, :])
            difference = score_i[:, None] - score_j[None, :]
            # The winner's score minus the loser's, whichever of the two i is, and minus the margin.
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
            pairs += tl.sum(tl.sum(better.to(tl.int32), 1), 0).to(tl.float64)
            # Twice the number of right pairs, as an integer, since a pair whose scores can't be ordered counts half.
            # Doubles would spill on an RTX 50.
            order = tl.where(difference > 0, 2, tl.where(difference < 0, 0, 1))
            right += 0.5 * tl.sum(tl.sum(tl.where(better, order, 0), 1), 0).to(tl.float64)
            if GRADIENT:
                # σ(−x) from e^(−|x|), which cannot overflow.
                sigmoid = tl.div_rn(tl.where(x < 0, 1.0, small), 1.0 + small)
                sigmoid = tl.where(x == x, sigmoid, x)
                slopes += tl.sum((tl.where(worse, sigmoid, 0.0) - tl.where(better, sigmoid, 0.0)).to(tl.float64), 1)
        if GRADIENT:
            tl.store(gradient + base + i, slopes.to(tl.float32), mask=here)
    share = 1.0 / tl.maximum(pairs, 1.0)
    if GRADIENT:
        tl.debug_barrier()  # another thread may have stored what this one loads
        for start in range(0, length, TILE):
            at = start + tl.arange(0, TILE)
            here = at < length
            slope = tl.load(gradient + base + at, mask=here, other=0.0)
            tl.store(gradient + base + at, (slope * share).to(tl.float32), mask=here)
    return loss * share, right * share, pairs > 0


@triton.jit
def _prompts(
    scores, ranks, mask, boundaries, gradient, sums, prompts, length, margin, FLAT: tl.constexpr,
    GRADIENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    losses = tl.cast(0.0, tl.float64)
    rights = tl.cast(0.0, tl.float64)
    number = tl.cast(0.0, tl.float64)
    for at in range(program, prompts, tl.num_programs(0)):
        prompt = program.to(tl.int64) + (at - program)
        loss, right, some = _prompt(
            scores, ranks, mask, boundaries, gradient, prompt, length, margin, FLAT, GRADIENT, TILE
        )
        losses += loss
        rights += right
        number += some.to(tl.float64)
    tl.store(sums + program * 3, losses)
    tl.store(sums + program * 3 + 1, rights)
    tl.store(sums + program * 3 + 2, number)


@triton.jit
def _finish(gradient, sums, loss, accuracy, programs, size, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Every program adds up the sums of the first launch, in the same order. The first program writes the means."""
    p = tl.arange(0, BLOCK)
    here = p < programs
    number = tl.sum(tl.load(sums + p * 3 + 2, mask=here, other=0.0), 0)
    share = 1.0 / tl.maximum(number, 1.0)
    if tl.program_id(0) == 0:
        tl.store(loss, (tl.sum(tl.load(sums + p * 3, mask=here, other=0.0), 0) * share).to(tl.float32))
        tl.store(accuracy, (tl.sum(tl.load(sums + p * 3 + 1, mask=here, other=0.0), 0) * share).to(tl.float32))
    if GRADIENT:
        at = tl.program_id(0).to(tl.int64) * BLOCK + p
        inside = at < size
        slope = tl.load(gradient + at, mask=inside, other=0.0)
        tl.store(gradient + at, (slope * share).to(tl.float32), mask=inside)


def pairwise_ranking_loss(
    scores: Tensor, ranks: Tensor, offsets: Tensor | None, mask: Tensor | None, margin: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, accuracy, and the gradient of ``scores`` (empty if not asked for)."""
    device = scores.device
    scores, ranks = scores.contiguous(), ranks.contiguous()
    gradient = torch.empty(scores.shape if with_gradient else 0, device=device)
    loss, accuracy = (torch.empty((), device=device) for _ in range(2))
    flat = offsets is not None
    prompts = offsets.shape[0] - 1 if offsets is not None else scores.shape[0]
    if prompts == 0 or scores.numel() == 0:
        return loss.zero_(), accuracy.zero_(), gradient
    length = 0 if flat else scores.shape[1]
    tile = 16 if flat else max(2, blocks(length, TILE))
    programs = min(prompts, PROGRAMS)
    sums = torch.empty(programs * 3, dtype=torch.float64, device=device)
    boundaries = ranks if offsets is None else offsets.contiguous()
    _prompts[(programs,)](
        scores, ranks, dense(mask), boundaries, gradient, sums, prompts, length, margin, FLAT=flat,
        GRADIENT=with_gradient, TILE=tile, num_warps=1 if tile <= 16 else 4,
    )  # fmt: skip
    _finish[(triton.cdiv(scores.numel(), BLOCK) if with_gradient else 1,)](
        gradient, sums, loss, accuracy, programs, scores.numel(), GRADIENT=with_gradient, BLOCK=BLOCK
    )
    return loss, accuracy, gradient
