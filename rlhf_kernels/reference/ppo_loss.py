"""−min(ρ·A, clip(ρ)·A) and ½·max((V − R)², (clip(V) − R)²), over the positions that count."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels.reference.common import upcast
from rlhf_kernels.reference.kl_reward import kl_penalty


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, wanted: Tensor, ref_logprobs: Tensor | None,
    beta: float, clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float | None,
    cispo: bool, by_sequence: bool, reduction: str, denominator: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate loss, or that of CISPO, with the penalty to a reference, and the statistics."""
    logprobs = torch.where(wanted, upcast(logprobs), 0.0)
    log_ratio = torch.where(wanted, logprobs - upcast(old_logprobs).detach(), 0.0)
    advantages = torch.where(wanted, upcast(advantages), 0.0).detach()
    if by_sequence:
        mean = log_ratio.detach().sum(1, keepdim=True) / wanted.sum(1, keepdim=True).clamp(min=1)
        own = torch.where(logprobs.isinf(), 0.0, logprobs - logprobs.detach())  # 0, with each token's own gradient
        log_ratio = torch.where(wanted, mean + own, 0.0)
    log_ratio_mean = masked_mean(log_ratio.detach(), wanted)
    # The log-ratio is bounded, so that its exponential stays finite: where the ratio is clipped, the gradient is
    # multiplied by 0, and 0 · inf is NaN. clamp would not do, since its gradient is 0 at NaN, which must show.
    largest = float(math.floor(math.log(torch.finfo(log_ratio.dtype).max)))
    if log_ratio_clamp is not None:
        largest = min(largest, log_ratio_clamp)
        log_ratio = torch.where(log_ratio < -log_ratio_clamp, -log_ratio_clamp, log_ratio)
    log_ratio = torch.where(log_ratio > largest, largest, log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if cispo:
        loss = -advantages * clipped.detach() * logprobs
        is_clipped = clipped != ratio
    else:
        unclipped_loss, clipped_loss = -advantages * ratio, -advantages * clipped
        loss = torch.maximum(unclipped_loss, clipped_loss)
        is_clipped = clipped_loss > unclipped_loss
        if dual_clip is not None:
            limit = -dual_clip * advantages
            is_limited = (advantages < 0) & (loss > limit)
            loss = torch.where(is_limited, limit, loss)
    with torch.no_grad():
        stats = {
            "ratio_mean": masked_mean(ratio, wanted),
            "log_ratio_mean": log_ratio_mean,
            "ratio_max_deviation": _largest(torch.where(wanted, (ratio - 1).abs(), 0.0)),
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, wanted),
            "clip_fraction": masked_mean((is_clipped & ~ratio.isnan()).to(ratio.dtype), wanted),
        }
        if dual_clip is not None:
            stats["dual_clip_fraction"] = masked_mean(is_limited.to(ratio.dtype), wanted)
    if ref_logprobs is not None:
        kl = kl_penalty(logprobs, ref_logprobs.detach(), wanted, "k3")
        if beta:
            loss = loss + beta * kl
        stats["ref_kl"] = masked_mean(kl.detach(), wanted)
    return reduced(loss, wanted, reduction, denominator), stats


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, wanted: Tensor, clip_range: float | None, reduction: str,
    denominator: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped value loss and its statistics."""
    values, old_values, returns = (torch.where(wanted, upcast(x), 0.0) for x in (values, old_values, returns))
    old_values, returns = old_values.detach(), returns.detach()
    error = (values - returns).square()
    clipped_error = error
    if clip_range is not None:
        clipped_error = (values.clamp(old_values - clip_range, old_values + clip_range) - returns).square()
    with torch.no_grad():
        stats = {
            "value_mean": masked_mean(values, wanted),
            "return_mean": masked_mean(returns, wanted),
            "clip_fraction": masked_mean((clipped_error > error).to(values.dtype), wanted),
        }
    return reduced(0.5 * torch.maximum(error, clipped_error), wanted, reduction, denominator), stats


def reduced(loss: Tensor, wanted: Tensor, reduction: str, denominator: float | None) -> Tensor:
    """The mean over positions, or the mean over rows of each row's mean or sum; ``denominator`` in place of a count."""
    loss = torch.where(wanted, loss, 0.0)
    if reduction == "token-mean":
        return loss.sum() / (wanted.sum().clamp(min=1) if denominator is None else denominator)
    counts = wanted.sum(1)
    rows = loss.sum(1)
    if reduction == "seq-mean-token-mean":
        rows = rows / counts.clamp(min=1)
    return rows.sum() / ((counts > 0).sum().clamp(min=1) if denominator is None else denominator)


def masked_mean(value: Tensor, wanted: Tensor) -> Tensor:
    """The mean over the positions that count; 0 when none does."""
    return torch.where(wanted, value, 0.0).sum() / wanted.sum().clamp(min=1)


def _largest(value: Tensor) -> Tensor:
    return value.max() if value.numel() else value.sum()
