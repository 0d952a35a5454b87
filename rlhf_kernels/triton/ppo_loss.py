"""PPO's losses, in two launches, or three where a sequence has one ratio: the first then averages its log-ratios.

The next reads the inputs once. It stores the sums of every block, and the gradient without a factor that depends
on the whole mask. The last adds up the sums, always in the same order, and multiplies the gradient by that factor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops import OPS
from rlhf_kernels.triton.common import LARGEST_WHOLE_EXPONENT, blocks, dense, exponential, load_mask, places, two_floats
from rlhf_kernels.triton.kl_reward import kl_estimate, kl_slope

BLOCK = 1024
RATIO_MEAN, LOG_RATIO_MEAN, RATIO_MAX_DEVIATION, APPROX_KL, CLIP_FRACTION, DUAL_CLIP_FRACTION, REF_KL = places(
    "ppo_policy_loss", "ratio_mean", "log_ratio_mean", "ratio_max_deviation", "approx_kl", "clip_fraction",
    "dual_clip_fraction", "ref_kl",
)  # fmt: skip
VALUE_MEAN, RETURN_MEAN, VALUE_CLIP_FRACTION = places("ppo_value_loss", "value_mean", "return_mean", "clip_fraction")
# What a block stores: how many positions count, its loss, and then a sum for each statistic, or the maximum for the
# largest deviation.
COUNT, LOSS, FIRST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SUMS = tl.constexpr(FIRST.value + max(len(OPS[name].statistics) for name in ("ppo_policy_loss", "ppo_value_loss")))


@triton.jit
def policy_term(
    logprob, exact, advantage, low, low_lost, high, high_lost, dual, least, largest, DUAL: tl.constexpr,
    CISPO: tl.constexpr,
):  # fmt: skip
    """Loss, its derivative in ``logprob``, ratio, (ratio − 1) − log ratio, and 1 if it is clipped, or dual-clipped.

    ``logprob`` and the log-ratio ``exact`` are float64, and so are the first two results. These are few operations, and
    the reads take longer. The exponential is in float32, together with what its rounding lost.
    """
    raw = exact.to(tl.float32)
    outside = (raw > largest) | (raw < least)
    log_ratio = tl.where(raw > largest, largest, tl.where(raw < least, least, raw))
    ratio, lost, kl = exponential(log_ratio)
    raw_lost = tl.where(outside | (tl.abs(raw) >= LARGEST_WHOLE_EXPONENT), 0.0, (exact - raw).to(tl.float32))
    precise = ratio.to(tl.float64) + (lost + ratio * raw_lost)
    kl += raw_lost * (ratio - 1.0)
    gain = -advantage.to(tl.float64)
    if CISPO:
        bottom = tl.cast(low, tl.float64) + low_lost
        top = tl.cast(high, tl.float64) + high_lost
        cut = (precise > top) | (precise < bottom)
        factor = tl.where(precise > top, top, tl.where(precise < bottom, bottom, precise))
        slope = gain * factor
        return slope * logprob, slope, ratio, kl, cut.to(tl.float32), 0.0 * cut.to(tl.float32)
    # Only one end of the clip range can raise the loss: the low one if the gain is above 0, else the high one.
    end = tl.where(gain > 0, tl.cast(low, tl.float64) + low_lost, tl.cast(high, tl.float64) + high_lost)
    unclipped = gain * precise
    clipped = gain * end
    cut = clipped > unclipped
    loss = tl.where(cut, clipped, unclipped)
    gradient = tl.where(cut | outside, 0.0, unclipped)
    limited = 0.0 * cut.to(tl.float32)
    if DUAL:
        limit = dual * gain
        over = (gain > 0) & (loss > limit)
        loss = tl.where(over, limit, loss)
        gradient = tl.where(over, 0.0, gradient)
        limited = over.to(tl.float32)
    return loss, gradient, ratio, kl, cut.to(tl.float32), limited


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
def reference_term(logprob, reference, beta, beta_lost):
    """β·k3, its derivative in ``logprob``, which is float64, and k3. With β = 0 the first two are 0 whatever k3 is."""
    near = logprob.to(tl.float32)
    lost = (logprob - near).to(tl.float32)
    slope = kl_slope(near, reference, "k3")
    correction = slope * lost
    penalty = kl_estimate(near, reference, "k3") + tl.where(correction == correction, correction, 0.0)
    factor = tl.cast(beta, tl.float64) + beta_lost
    return tl.where(factor == 0, 0.0, factor * penalty), tl.where(factor == 0, 0.0, factor * slope), penalty


@triton.jit
def _log_ratios(logprobs, old_logprobs, mask, log_ratios, length, BLOCK: tl.constexpr):
    """The mean of a row's log-ratios: one ratio for the whole sequence."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.cast(0.0, tl.float64)
    number = tl.cast(0.0, tl.float64)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        at = row * length + t
        counts = load_mask(mask, at, t < length)
        x = tl.load(logprobs + at, mask=counts, other=0.0).to(tl.float64)
        y = tl.load(old_logprobs + at, mask=counts, other=0.0).to(tl.float64)
        total += tl.sum(x - y, 0)
        number += tl.sum(counts.to(tl.float64), 0)
    tl.store(log_ratios + row, total * _reciprocal(number))


@triton.jit
def _terms(
    first, second, third, fourth, mask, log_ratios, gradient, sums, size, length, per_row, low, low_lost, high,
    high_lost, dual, least, largest, beta, beta_lost, clip_range, DUAL: tl.constexpr, CISPO: tl.constexpr,
    POLICY: tl.constexpr, REFERENCE: tl.constexpr, BY_SEQUENCE: tl.constexpr, CLIP: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    t = block * BLOCK + tl.arange(0, BLOCK)
    at = row * length + t
    here = (t < length) & (at < size)
    counts = load_mask(mask, at, here)
    x = tl.load(first + at, mask=counts, other=0.0).to(tl.float32)
    y = tl.load(second + at, mask=counts, other=0.0).to(tl.float32)
    z = tl.load(third + at, mask=counts, other=0.0).to(tl.float32)
    to = sums + (row * per_row + block) * SUMS
    if POLICY:
        # A masked position has advantage 0 and ratio 1: only the ratio must be kept out of the sums.
        exact = x.to(tl.float64) - y.to(tl.float64)
        if BY_SEQUENCE:
            exact = tl.where(counts, tl.load(log_ratios + row), 0.0)
        loss, slope, ratio, kl, clipped, limited = policy_term(
            x.to(tl.float64), exact, z, low, low_lost, high, high_lost, dual, least, largest, DUAL, CISPO
        )
        ref_kl = tl.zeros_like(x)
        if REFERENCE:
            ref = tl.load(fourth + at, mask=counts, other=0.0).to(tl.float32)
            ref_loss, ref_slope, ref_kl = reference_term(x.to(tl.float64), ref, beta, beta_lost)
            loss += ref_loss
            slope += ref_slope
        tl.store(to + FIRST + REF_KL, tl.sum(ref_kl, 0))
        tl.store(to + FIRST + RATIO_MEAN, tl.sum(tl.where(counts, ratio, 0.0), 0))
        tl.store(to + FIRST + LOG_RATIO_MEAN, tl.sum(exact, 0))
        tl.store(to + FIRST + RATIO_MAX_DEVIATION, tl.max(tl.abs(ratio - 1.0), 0))
        tl.store(to + FIRST + APPROX_KL, tl.sum(kl, 0))
        tl.store(to + FIRST + CLIP_FRACTION, tl.sum(clipped, 0))
        tl.store(to + FIRST + DUAL_CLIP_FRACTION, tl.sum(limited, 0))
    else:
        loss, slope, clipped = value_term(x, y, z, clip_range, CLIP)
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
    log_ratio = tl.cast(0.0, tl.float64)
    limited = tl.cast(0.0, tl.float64)
    ref_kl = tl.cast(0.0, tl.float64)
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
            log_ratio += _sum(entry, FIRST + LOG_RATIO_MEAN, inside)
            limited += _sum(entry, FIRST + DUAL_CLIP_FRACTION, inside)
            ref_kl += _sum(entry, FIRST + REF_KL, inside)
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
            tl.store(statistics + LOG_RATIO_MEAN, (log_ratio * share).to(tl.float32))
            tl.store(statistics + DUAL_CLIP_FRACTION, (limited * share).to(tl.float32))
            tl.store(statistics + REF_KL, (ref_kl * share).to(tl.float32))
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
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None, ref_logprobs: Tensor | None,
    beta: float, clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float | None,
    cispo: bool, by_sequence: bool, reduction: str, denominator: float | None, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, statistics, and the gradient of ``logprobs`` (empty if not asked for)."""
    inputs = [x.contiguous() for x in (logprobs, old_logprobs, advantages)]
    reference = inputs[0] if ref_logprobs is None else ref_logprobs.contiguous()
    mask = dense(mask)
    log_ratios = inputs[0]
    if by_sequence and logprobs.numel():
        rows, length = logprobs.shape
        log_ratios = torch.empty(rows, dtype=torch.float64, device=logprobs.device)
        _log_ratios[(rows,)](inputs[0], inputs[1], mask, log_ratios, length, BLOCK=blocks(length, BLOCK), num_warps=8)
    options = policy_options(clip_low, clip_high, dual_clip, log_ratio_clamp, cispo, beta)
    options |= {"clip_range": 0.0, "CLIP": False, "POLICY": True}
    options |= {"REFERENCE": ref_logprobs is not None, "BY_SEQUENCE": by_sequence}
    return _run(
        "ppo_policy_loss", (*inputs, reference, mask, log_ratios), options, reduction, denominator, with_gradient
    )


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None, clip_range: float | None, reduction: str,
    denominator: float | None, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, statistics, and the gradient of ``values`` (empty if not asked for)."""
    first, *others = (x.contiguous() for x in (values, old_values, returns))
    options = policy_options(0.0, 0.0, None, None, False, 0.0)
    options |= {"clip_range": clip_range or 0.0, "CLIP": clip_range is not None, "POLICY": False}
    options |= {"REFERENCE": False, "BY_SEQUENCE": False}
    inputs = (first, *others, first, dense(mask), first)
    return _run("ppo_value_loss", inputs, options, reduction, denominator, with_gradient)


def _run(
    name: str, inputs: tuple[Any, ...], options: dict[str, Any], reduction: str, denominator: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    first = inputs[0]
    device = first.device
    gradient = torch.empty(first.shape if with_gradient else 0, device=device)
    statistics = torch.empty(len(OPS[name].statistics), device=device)
    if first.numel() == 0:
        return torch.zeros((), device=device), statistics.zero_(), gradient
    loss = torch.empty((), device=device)
    size = first.numel()
    if reduction == "token-mean" and not options["BY_SEQUENCE"]:  # rows do not matter, so each block is taken for a row
        length = block = blocks(size, BLOCK)
        rows, per_row = triton.cdiv(size, block), 1
    else:
        rows, length = first.shape
        block = blocks(length, BLOCK)
        per_row = triton.cdiv(length, block)
    sums = torch.empty(rows * per_row * SUMS.value, dtype=torch.float64, device=device)
    _terms[(rows, per_row)](
        *inputs, gradient, sums, size, length, per_row, **options, GRADIENT=with_gradient, BLOCK=block, num_warps=4
    )  # fmt: skip
    width = triton.next_power_of_2(per_row)
    _finish[(rows, per_row) if with_gradient else (1, 1)](
        gradient, sums, loss, statistics, size, length, per_row, rows,
        *two_floats(0.0 if denominator is None else 1.0 / denominator), POLICY=options["POLICY"], REDUCTION=reduction,
        DENOMINATOR=denominator is not None, GRADIENT=with_gradient, BLOCK=block,
        ROWS=blocks(rows, max(1, 1024 // width)), PER_ROW=width,
    )  # fmt: skip
    return loss, statistics, gradient


def policy_options(
    clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float | None, cispo: bool, beta: float
) -> dict[str, Any]:
    """The options of a policy loss under the names that the kernels have for them; some numbers as two floats."""
    low, low_lost = two_floats(1.0 - clip_low)
    high, high_lost = two_floats(1.0 + clip_high)
    beta, beta_lost = two_floats(beta)
    largest = LARGEST_WHOLE_EXPONENT.value
    return {
        "low": low, "low_lost": low_lost, "high": high, "high_lost": high_lost, "dual": dual_clip or 0.0,
        "least": -math.inf if log_ratio_clamp is None else -log_ratio_clamp,
        "largest": largest if log_ratio_clamp is None else min(largest, log_ratio_clamp),
        "beta": beta, "beta_lost": beta_lost, "DUAL": dual_clip is not None, "CISPO": cispo,
    }  # fmt: skip


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
