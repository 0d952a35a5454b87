"""PPO's clipped losses for the policy and the value model, with the statistics that tell how an update goes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import choose
from rlhf_kernels.ops import OPS
from rlhf_kernels.reference import ppo_loss as reference
from rlhf_kernels.registration import autograd_of_loss, call, fake, needs_gradient

SURROGATES = ("clipped", "cispo")
RATIO_LEVELS = ("token", "sequence")
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum")


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    surrogate: str = "clipped",
    ratio_level: str = "token",
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    reduction: str = "token-mean",
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """−min(ρ·A, clip(ρ, 1−ε, 1+ε_high)·A) with ρ = π/π_old, reduced over unmasked positions.

    Schulman et al. 2017, equation 7. Differentiable in ``logprobs`` alone. At masked positions any value, NaN
    included, leaves loss and gradient untouched. docs/algorithms.md has the options that make the losses of GRPO, DAPO,
    Dr. GRPO, GSPO, CISPO and RLOO of it.

    Args:
        logprobs: (B, T) or (N,) floating point: log-probs of the sampled tokens under the policy.
        old_logprobs: the same shape: under the policy that sampled them. None: under this very policy, so that every ρ
            is 1, and the gradient that of −A·log π.
        advantages: the same shape; or (B,), one for all positions of a row.
        mask: the same shape as logprobs, bool or {0, 1}: which positions are response tokens. None: all of them.
        surrogate: "clipped", the loss above; or "cispo": −clip(ρ)·A·log π with a constant ρ, so that every position
            keeps a gradient (MiniMax 2025, arXiv 2506.13585, equation 4).
        ratio_level: "token"; or "sequence": every position of a row has the ratio exp(mean over the row of log ρ)
            (GSPO, Zheng et al. 2025, arXiv 2507.18071, equation 7), with its own token's gradient (equation 14). Not
            for (N,).
        clip_range: ε in (0, 1].
        clip_range_high: ε_high, when it differs from ε (Yu et al. 2025, arXiv 2503.14476, "clip-higher"): in (0, 1],
            and any number above 0 for "cispo".
        dual_clip: c > 1: where A < 0 the loss is at most −c·A (Ye et al. 2020, arXiv 1912.09729, eq. 5). Not for
            "cispo".
        log_ratio_clamp: c > 0 limits log ρ (of the row, for "sequence") to [−c, c]; beyond, ρ is a constant. None: ρ is
            kept finite, no more.
        ref_logprobs: as logprobs: under a reference policy, towards which ``beta`` pulls.
        beta: β ≥ 0, the weight of a penalty β·k3 on every position (:func:`~rlhf_kernels.kl_penalty`; Shao et al.
            2024, arXiv 2402.03300, equation 4), which is differentiated too. 0: k3 is reported and no more.
        reduction: "token-mean": over all unmasked positions; "token-sum": their sum; "seq-mean-token-mean" and
            "seq-mean-token-sum": mean or sum within each row, then the mean over rows that have an unmasked position.
            The last two are not for (N,).
        denominator: N > 0, in place of the number of positions ("token-mean") or rows that a mean divides by. With that
            of all micro-batches and processes their losses, and gradients, add up exactly to those of the whole batch.

    Returns:
        The scalar loss (0 when nothing is unmasked), and scalar statistics over unmasked positions, without gradient:
        ``ratio_mean``; ``log_ratio_mean``, the mean of log ρ before any clamp; ``ratio_max_deviation``, the largest
        |ρ − 1|; ``approx_kl``, the mean of (ρ − 1) − log ρ, for ratios of tokens an estimate of KL(π_old ‖ π) in nats;
        ``clip_fraction``, the share of positions where −clip(ρ)·A is the larger loss, and so the one chosen. A ρ
        outside the range is not counted where clipping does not change the loss, and ``dual_clip`` is not counted
        either. TRL and verl count in the same way. For "cispo" it is the share of ρ outside the range. With
        ``dual_clip`` also ``dual_clip_fraction``, the share of positions that it limits; with ``ref_logprobs`` also
        ``ref_kl``, the mean of k3, in nats.

    Raises:
        TypeError: an argument is not a tensor of a dtype above.
        ValueError: shapes or devices differ, an option is out of range or does not fit another, or (looked at on the
            CPU only) a mask holds something besides 0 and 1.
    """
    checks.tensor("logprobs", logprobs, checks.FLOATS)
    shape = logprobs.shape
    if old_logprobs is None:
        old_logprobs = logprobs.detach()
    advantages = spread("advantages", advantages, shape)
    _check_tokens(("logprobs", logprobs), ("old_logprobs", old_logprobs), ("advantages", advantages), mask)
    checks.choice("ratio_level", ratio_level, RATIO_LEVELS)
    if ratio_level == "sequence" and len(shape) != 2:
        raise ValueError(f"ratio_level: is 'sequence', which needs (B, T) inputs; these have {len(shape)} dimension(s)")
    reference_options = check_reference(ref_logprobs, beta, logprobs, shape)
    options = check_surrogate(surrogate, clip_range, clip_range_high, dual_clip, log_ratio_clamp)
    reduction, denominator = check_reduction(reduction, denominator, len(shape))
    backend = choose("ppo_policy_loss", logprobs, old_logprobs, advantages, ref_logprobs)
    mask = checks.read_mask(backend, "mask", mask, logprobs)
    arguments: tuple[Any, ...] = (
        logprobs, old_logprobs, advantages, mask, *reference_options, *options, ratio_level == "sequence", reduction,
        denominator,
    )  # fmt: skip
    if backend == "reference":
        return reference.ppo_policy_loss(*arguments)
    loss, statistics, _ = call(backend, "ppo_policy_loss", *arguments, needs_gradient(logprobs))
    return loss, policy_statistics(statistics.unbind(), dual_clip, ref_logprobs)


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    *,
    clip_range: float | None = 0.2,
    reduction: str = "token-mean",
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²), reduced over unmasked positions.

    The value loss of the PPO of Stiennon et al. 2020 and its predecessors. Differentiable in ``values`` alone.

    Args:
        values: (B, T) or (N,) floating point: the value model's estimates.
        old_values: the same shape: its estimates when the batch was sampled.
        returns: the same shape: the targets R.
        mask: the same shape, bool or {0, 1}; None: every position counts.
        clip_range: ε > 0, in units of value; None for the plain squared error.
        reduction: as for :func:`ppo_policy_loss`.
        denominator: likewise.

    Returns:
        The scalar loss (0 when nothing is unmasked), and scalar statistics over unmasked positions, without gradient:
        ``value_mean``, ``return_mean``, and ``clip_fraction``, the share where the clipped error is the larger.

    Raises:
        TypeError: an argument is not a tensor of a dtype above.
        ValueError: shapes or devices differ, an option is out of range, or (looked at on the CPU only) a mask holds
            something besides 0 and 1.
    """
    _check_tokens(("values", values), ("old_values", old_values), ("returns", returns), mask)
    if clip_range is not None:
        clip_range = checks.number("clip_range", clip_range, 0.0, exclusive_low=True)
    reduction, denominator = check_reduction(reduction, denominator, values.dim())
    backend = choose("ppo_value_loss", values, old_values, returns)
    mask = checks.read_mask(backend, "mask", mask, values)
    arguments: tuple[Any, ...] = (values, old_values, returns, mask, clip_range, reduction, denominator)
    if backend == "reference":
        return reference.ppo_value_loss(*arguments)
    loss, statistics, _ = call(backend, "ppo_value_loss", *arguments, needs_gradient(values))
    return loss, OPS["ppo_value_loss"].named(statistics)


def _check_tokens(
    first: tuple[str, Tensor], second: tuple[str, Tensor], third: tuple[str, Tensor], mask: Tensor | None
) -> None:
    name, like = first
    checks.tensor(name, like, checks.FLOATS)
    if like.dim() not in (1, 2):
        raise ValueError(f"{name}: has shape {tuple(like.shape)}, must be (B, T) or (N,)")
    shape = like.shape
    for other, value in (second, third):
        checks.tensor(other, value, checks.FLOATS, like)
        if value.shape != shape:  # here too, since the words for the error take time
            checks.shape(other, value, shape, f"the shape of {name}")
    checks.mask("mask", mask, like, shape)


def spread(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A value per row (B,), if that is what there is, as one per position (B, T). The caller checks all else.

    Raises:
        ValueError: another number of rows.
    """
    if len(shape) == 2 and isinstance(value, Tensor) and value.dim() == 1:
        checks.shape(name, value, shape[:1], f"one per row, or {tuple(shape)}, one per position")
        return value[:, None].expand(shape)
    return value


def check_reference(
    ref_logprobs: Tensor | None, beta: float, like: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor | None, float]:
    """The reference policy's log-probs and the weight of the penalty as the kernels take them."""
    if ref_logprobs is None and type(beta) is float and beta == 0:
        return None, 0.0
    beta = checks.number("beta", beta, 0.0)
    if ref_logprobs is None:
        if beta:
            raise ValueError(f"beta: is {beta} without ref_logprobs, the log-probs under the reference policy")
        return None, 0.0
    checks.tensor("ref_logprobs", ref_logprobs, checks.FLOATS, like)
    checks.shape("ref_logprobs", ref_logprobs, shape, "one entry per position")
    return ref_logprobs, beta


def check_surrogate(
    surrogate: str, clip_range: float, clip_range_high: float | None, dual_clip: float | None,
    log_ratio_clamp: float | None,
) -> tuple[float, float, float | None, float | None, bool]:  # fmt: skip
    """The options of a token's loss as the kernels take them: ε, ε_high, c, the clamp, and whether it is CISPO's."""
    checks.choice("surrogate", surrogate, SURROGATES)
    cispo = surrogate == "cispo"
    low = high = checks.number("clip_range", clip_range, 0.0, 1.0, exclusive_low=True)
    if clip_range_high is not None:
        most = math.inf if cispo else 1.0
        high = checks.number("clip_range_high", clip_range_high, 0.0, most, exclusive_low=True)
    if dual_clip is not None:
        dual_clip = checks.number("dual_clip", dual_clip, 1.0, exclusive_low=True)
        if cispo:
            raise ValueError(f"dual_clip: is {dual_clip} with surrogate 'cispo', whose ratio is clipped for every sign")
    if log_ratio_clamp is not None:
        log_ratio_clamp = checks.number("log_ratio_clamp", log_ratio_clamp, 0.0, exclusive_low=True)
    return low, high, dual_clip, log_ratio_clamp, cispo


def policy_statistics(
    values: tuple[Tensor, ...], dual_clip: float | None, ref_logprobs: Tensor | None
) -> dict[str, Tensor]:
    """The statistics by name; those of the dual clip and of the reference policy where there is one."""
    ratio_mean, log_ratio_mean, deviation, approx_kl, clip_fraction, dual_clip_fraction, ref_kl = values
    named = {  # in words, since making it of the table of names would take longer
        "ratio_mean": ratio_mean, "log_ratio_mean": log_ratio_mean, "ratio_max_deviation": deviation,
        "approx_kl": approx_kl, "clip_fraction": clip_fraction,
    }  # fmt: skip
    if dual_clip is not None:
        named["dual_clip_fraction"] = dual_clip_fraction
    if ref_logprobs is not None:
        named["ref_kl"] = ref_kl
    return named


def check_reduction(reduction: str, denominator: float | None, dims: int) -> tuple[str, float | None]:
    """The reduction and the denominator as the kernels take them, for inputs of so many dimensions."""
    checks.choice("reduction", reduction, REDUCTIONS)
    if dims != 2 and not reduction.startswith("token"):
        raise ValueError(f"reduction: is {reduction!r}, which needs (B, T) inputs; these have {dims} dimension(s)")
    if denominator is not None:
        denominator = checks.number("denominator", denominator, 0.0, exclusive_low=True)
    if reduction == "token-sum":
        if denominator is not None:
            raise ValueError(f"denominator: is {denominator} with reduction 'token-sum', which divides by nothing")
        return "token-mean", 1.0
    return reduction, denominator


def _results(name: str, like: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((), (len(OPS[name].statistics),), like.shape if with_gradient else (0,))
    loss, statistics, gradient = (like.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return loss, statistics, gradient


@fake("ppo_policy_loss")
def _(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None, ref_logprobs: Tensor | None,
    beta: float, clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float | None,
    cispo: bool, by_sequence: bool, reduction: str, denominator: float | None, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _results("ppo_policy_loss", logprobs, with_gradient)


@fake("ppo_value_loss")
def _(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None, clip_range: float | None, reduction: str,
    denominator: float | None, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _results("ppo_value_loss", values, with_gradient)


autograd_of_loss("ppo_policy_loss", "logprobs")
autograd_of_loss("ppo_value_loss", "values")
