"""PPO's losses, in two launches.

The first reads the three inputs once. It stores the sums of every block, and the gradient without a factor that depends
on the whole mask. The second adds up the sums, always in the same order, and multiplies the gradient by that factor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops import OPS
from rlhf_kernels.triton.common import LARGEST_WHOLE_EXPONENT, blocks, exponential, load_mask, places, two_floats

BLOCK = 1024
RATIO_MEAN, RATIO_MAX_DEVIATION, APPROX_KL, CLIP_FRACTION = places(
    "ppo_policy_loss", "ratio_mean", "ratio_max_deviation", "approx_kl", "clip_fraction"
)
VALUE_MEAN, RETURN_MEAN, VALUE_CLIP_FRACTION = places("ppo_value_loss", "value_mean", "return_mean", "clip_fraction")
# What a block stores: how many positions count, its loss, and then a sum for each statistic, or the maximum for the
# largest deviation.
COUNT, LOSS, FIRST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SUMS = tl.constexpr(FIRST.value + max(len(OPS[name].statistics) for name in ("ppo_policy_loss", "ppo_value_loss")))


@triton.jit
def policy_term(logprob, old_logprob, advantage, low, low_lost, high, high_lost, dual, DUAL: tl.constexpr):
    """Loss, its derivative in ``logprob``, ratio, |ratio − 1|, (ratio − 1) − log ratio, and 1 if the loss is clipped.

    ``logprob`` and ``old_logprob`` are float64, and so are the first two results. These are few operations, and the
    reads take longer. The exponential is in float32, together with what its rounding lost.
    """
    exact = logprob - old_logprob
    raw = exact.to(tl.float32)
    log_ratio = tl.where(raw > LARGEST_WHOLE_EXPONENT, LARGEST_WHOLE_EXPONENT, raw)
    ratio, lost, kl = exponential(log_ratio)
    raw_lost = tl.where(tl.abs(raw) < LARGEST_WHOLE_EXPONENT, (exact - raw).to(tl.float32), 0.0)
    precise = ratio.to(tl.float64) + (lost + ratio * raw_lost)
    kl += raw_lost * (ratio - 1.0)
    gain = -advantage.to(tl.float64)
    # Only one end of the clip range can raise the loss: the low one if the gain is above 0, else the high one.
    end = tl.where(gain > 0, tl.cast(low, tl.float64) + low_lost, tl.cast(high, tl.float64) + high_lost)
    unclipped = gain * precise
    clipped = gain * end
    cut = clipped > unclipped
    loss = tl.where(cut, clipped, unclipped)
    gradient = tl.where(cut | (raw > LARGEST_WHOLE_EXPONENT), 0.0, unclipped)
    if DUAL:
        limit = dual * gain
        over = (gain > 0) & (loss > limit)
        loss = tl.where(over, limit, loss)
        gradient = tl.where(over, 0.0, gradient)
    return loss, gradient, ratio, tl.abs(ratio - 1.0), kl, cut.to(tl.float32)


@triton.jit
def value_term(value, old_value, target, clip_range, CLIP: tl.constexpr):
    """Half the larger squared error, its derivative in ``value``, and 1 where the clipped error is the larger."""
    error = value - target
    loss = error * error
    gradient = error
    clipped = tl.zeros_like(value)
    if CLIP:
        low = old_value - clip_range
        high = old_value + clip_range
        kept = tl.where(value < low, low, tl.where(value > high, high, value))
        other = (kept - target) * (kept - target)
        cut = other > loss
        loss = tl.where(cut, other, loss)
        gradient = tl.where(cut, 0.0, gradient)  # the clipped value does not change with the value
        clipped = cut.to(tl.float32)
    return 0.5 * loss, gradient, clipped


@triton.jit
def _terms(
    first, second, third, wanted, gradient, sums, size, length, per_row, low, low_lost, high, high_lost,
    dual_clip, clip_range, POLICY: tl.constexpr, OPTION: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    t = block * BLOCK + tl.arange(0, BLOCK)
    at = row * length + t
    here = (t < length) & (at < size)
    counts = load_mask(wanted + at, here)
    x = tl.load(first + at, mask=counts, other=0.0).to(tl.float32)
    y = tl.load(second + at, mask=counts, other=0.0).to(tl.float32)
    z = tl.load(third + at, mask=counts, other=0.0).to(tl.float32)
    to = sums + (row * per_row + block) * SUMS
    if POLICY:
        # A masked position has advantage 0 and ratio 1: only the ratio must be kept out of the sums.
        loss, slope, ratio, deviation, kl, clipped = policy_term(
            x.to(tl.float64), y.to(tl.float64), z, low, low_lost, high, high_lost, dual_clip, OPTION
        )
        tl.store(to + FIRST + RATIO_MEAN, tl.sum(tl.where(counts, ratio, 0.0), 0))
        tl.store(to + FIRST + RATIO_MAX_DEVIATION, tl.max(deviation, 0))
        tl.store(to + FIRST + APPROX_KL, tl.sum(kl, 0))
        tl.store(to + FIRST + CLIP_FRACTION, tl.sum(clipped, 0))
    else:
        loss, slope, clipped = value_term(x, y, z, clip_range, OPTION)
        tl.store(to + FIRST + VALUE_MEAN, tl.sum(x, 0))
        tl.store(to + FIRST + RETURN_MEAN, tl.sum(z, 0))
        tl.store(to + FIRST + VALUE_CLIP_FRACTION, tl.sum(clipped, 0))
    tl.store(to + COUNT, tl.sum(counts.to(tl.float32), 0))
    tl.store(to + LOSS, tl.sum(loss.to(tl.float64), 0))
    if GRADIENT:
        tl.store(gradient + at, slope.to(tl.float32), mask=here)


@triton.jit
def _column(entry, column, inside):
    return tl.load(entry + column, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _sum(entry, column, inside):
    """The sum over (rows, blocks), first over the blocks of each row."""
    return tl.sum(tl.sum(_column(entry, column, inside), 1), 0)


@triton.jit
def _reciprocal(count):
    """1 / max(count, 1) in float64, by Newton's method from float32. A float64 division is a subroutine that spills."""
    x = tl.maximum(count, 1.0)
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y = y * (2.0 - x * y)
    return y * (2.0 - x * y)


@triton.jit
def _finish(
    gradient, sums, loss, statistics, size, length, per_row, rows, share_given, share_lost,
    POLICY: tl.constexpr, REDUCTION: tl.constexpr, DENOMINATOR: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """Every program adds up the sums of all blocks, to get its own factor. The first program writes the results."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    number = tl.cast(0.0, tl.float64)  # of positions that count
    rows_with_some = tl.cast(0.0, tl.float64)
    total = tl.cast(0.0, tl.float64)  # of the losses
    ratio = tl.cast(0.0, tl.float64)
    deviation = tl.cast(0.0, tl.float64)
    kl = tl.cast(0.0, tl.float64)
    value = tl.cast(0.0, tl.float64)
    target = tl.cast(0.0, tl.float64)
    clipped = tl.cast(0.0, tl.float64)
    p = tl.arange(0, PER_ROW)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & (p < per_row)[None, :]
        entry = sums + (r.to(tl.int64)[:, None] * per_row + p[None, :]) * SUMS
        counts = tl.sum(_column(entry, COUNT, inside), 1)
        losses = tl.sum(_column(entry, LOSS, inside), 1)
        if REDUCTION == "seq-mean-token-mean":
            losses = losses * _reciprocal(counts)
        number += tl.sum(counts, 0)
        rows_with_some += tl.sum((counts > 0).to(tl.float64), 0)
        total += tl.sum(losses, 0)
        if POLICY:
            ratio += _sum(entry, FIRST + RATIO_MEAN, inside)
            largest = tl.max(tl.max(_column(entry, FIRST + RATIO_MAX_DEVIATION, inside), 1), 0)
            deviation = tl.maximum(deviation, largest)
            kl += _sum(entry, FIRST + APPROX_KL, inside)
            clipped += _sum(entry, FIRST + CLIP_FRACTION, inside)
        else:
            value += _sum(entry, FIRST + VALUE_MEAN, inside)
            target += _sum(entry, FIRST + RETURN_MEAN, inside)
            clipped += _sum(entry, FIRST + VALUE_CLIP_FRACTION, inside)
    weighted = rows_with_some
    if REDUCTION == "token-mean":
        weighted = number
    weight = _reciprocal(weighted)
    if DENOMINATOR:
        weight = tl.cast(share_given, tl.float64) + share_lost
    if (row == 0) & (block == 0):
        share = _reciprocal(number)
        tl.store(loss, (total * weight).to(tl.float32))
        if POLICY:
            # The maximum skips NaN, but if a ratio was NaN, the sum of the ratios is too.
            deviation = tl.where(ratio == ratio, deviation, float("nan"))
            tl.store(statistics + RATIO_MEAN, (ratio * share).to(tl.float32))
            tl.store(statistics + RATIO_MAX_DEVIATION, deviation.to(tl.float32))
            tl.store(statistics + APPROX_KL, (kl * share).to(tl.float32))
            tl.store(statistics + CLIP_FRACTION, (clipped * share).to(tl.float32))
        else:
            tl.store(statistics + VALUE_MEAN, (value * share).to(tl.float32))
            tl.store(statistics + RETURN_MEAN, (target * share).to(tl.float32))
            tl.store(statistics + VALUE_CLIP_FRACTION, (clipped * share).to(tl.float32))
    if GRADIENT:
        if REDUCTION == "seq-mean-token-mean":
            in_row = tl.sum(_column(sums + (row * per_row + p) * SUMS, COUNT, p < per_row), 0)
            weight = weight * _reciprocal(in_row)
        t = block * BLOCK + tl.arange(0, BLOCK)
        at = row * length + t
        here = (t < length) & (at < size)
        slope = tl.load(gradient + at, mask=here, other=0.0)
        # The weight in two float32 parts, since products in float64 would spill registers.
        high = weight.to(tl.float32)
        low = (weight - high).to(tl.float32)
        rest = tl.where(tl.abs(slope) < float("inf"), slope * low, 0.0)
        tl.store(gradient + at, slope * high + rest, mask=here)


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, wanted: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None, reduction: str, denominator: float | None, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, statistics, and the gradient of ``logprobs`` (empty if not asked for)."""
    inputs = (logprobs, old_logprobs, advantages, wanted)
    options = clip_ends(clip_low, clip_high) | {"dual_clip": dual_clip or 0.0, "clip_range": 0.0}
    return _run(inputs, options, dual_clip is not None, reduction, denominator, with_gradient, policy=True)


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, wanted: Tensor, clip_range: float | None, reduction: str,
    denominator: float | None, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, statistics, and the gradient of ``values`` (empty if not asked for)."""
    inputs = (values, old_values, returns, wanted)
    options = clip_ends(0.0, 0.0) | {"dual_clip": 0.0, "clip_range": clip_range or 0.0}
    return _run(inputs, options, clip_range is not None, reduction, denominator, with_gradient, policy=False)


def _run(
    inputs: tuple[Tensor, ...], options: dict[str, float], option: bool, reduction: str, denominator: float | None,
    with_gradient: bool, *, policy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    first = inputs[0]
    device = first.device
    gradient = torch.empty(first.shape if with_gradient else 0, device=device)
    op = OPS["ppo_policy_loss" if policy else "ppo_value_loss"]
    statistics = torch.empty(len(op.statistics), device=device)
    if first.numel() == 0:
        return torch.zeros((), device=device), statistics.zero_(), gradient
    loss = torch.empty((), device=device)
    size = first.numel()
    if reduction == "token-mean":  # rows do not matter, so each block is taken for a row
        length = block = blocks(size, BLOCK)
        rows, per_row = triton.cdiv(size, block), 1
    else:
        rows, length = first.shape
        block = blocks(length, BLOCK)
        per_row = triton.cdiv(length, block)
    sums = torch.empty(rows * per_row * SUMS.value, dtype=torch.float64, device=device)
    _terms[(rows, per_row)](
        *(x.contiguous() for x in inputs), gradient, sums, size, length, per_row, **options,
        POLICY=policy, OPTION=option, GRADIENT=with_gradient, BLOCK=block, num_warps=8,
    )  # fmt: skip
    width = triton.next_power_of_2(per_row)
    _finish[(rows, per_row) if with_gradient else (1, 1)](
        gradient, sums, loss, statistics, size, length, per_row, rows,
        *two_floats(0.0 if denominator is None else 1.0 / denominator), POLICY=policy, REDUCTION=reduction,
        DENOMINATOR=denominator is not None, GRADIENT=with_gradient, BLOCK=block,
        ROWS=blocks(rows, max(1, 1024 // width)), PER_ROW=width,
    )  # fmt: skip
    return loss, statistics, gradient


def clip_ends(clip_low: float, clip_high: float) -> dict[str, float]:
    """1 − ε and 1 + ε_high, each as two floats (:func:`two_floats`), under the names that the kernels have for them."""
    low, low_lost = two_floats(1.0 - clip_low)
    high, high_lost = two_floats(1.0 + clip_high)
    return {"low": low, "low_lost": low_lost, "high": high, "high_lost": high_lost}


def row_weights(wanted: Tensor, reduction: str, denominator: float | None) -> Tensor:
    """The weight of each position under a reduction, float64 and of the mask's shape."""
    if denominator is not None:
        weights = torch.full((), 1.0 / denominator, dtype=torch.float64, device=wanted.device)
    else:
        number = wanted.sum() if reduction == "token-mean" else wanted.any(1).sum()
        weights = number.clamp(min=1).double().reciprocal()
    if reduction == "token-mean":
        return weights.expand(wanted.shape)
    counts = wanted.sum(1)
    rows = weights / counts.clamp(min=1) if reduction == "seq-mean-token-mean" else weights.expand(counts.shape)
    return rows[:, None].expand(wanted.shape)


def policy_results(losses: Tensor, statistics: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its statistics, from the rows' weighted losses (float64), statistics, and 1 / their number."""
    loss = losses.sum().float()
    if not len(losses):
        return loss, statistics.new_zeros(statistics.shape[1])
    values = statistics.sum(0, dtype=torch.float64) * share
    deviation = RATIO_MAX_DEVIATION.value
    values[deviation] = statistics[:, deviation].amax()
    return loss, values.float()
