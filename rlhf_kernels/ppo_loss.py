"""PPO's clipped losses for the policy and the value model, with the statistics that tell how an update goes."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import choose
from rlhf_kernels.ops import OPS
from rlhf_kernels.reference import ppo_loss as reference
from rlhf_kernels.registration import autograd_of_loss, call, fake, needs_gradient

REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum")


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    reduction: str = "token-mean",
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """−min(ρ·A, clip(ρ, 1−ε, 1+ε_high)·A) with ρ = π/π_old, reduced over unmasked positions.

    Schulman et al. 2017, equation 7. Differentiable in ``logprobs`` alone. At masked positions any value, NaN
    included, leaves loss and gradient untouched.

    Args:
        logprobs: (B, T) or (N,) floating point: log-probs of the sampled tokens under the policy.
        old_logprobs: the same shape: under the policy that sampled them.
        advantages: the same shape.
        mask: the same shape, bool or {0, 1}: which positions are response tokens. None: all of them.
        clip_range: ε in (0, 1].
        clip_range_high: ε_high in (0, 1], when it differs from ε (Yu et al. 2025, arXiv 2503.14476, "clip-higher").
        dual_clip: c > 1: where A < 0 the loss is at most −c·A (Ye et al. 2020, arXiv 1912.09729, eq. 5).
        reduction: "token-mean": over all unmasked positions; "token-sum": their sum; "seq-mean-token-mean" and
            "seq-mean-token-sum": mean or sum within each row, then the mean over rows that have an unmasked position.
            The last two are not for (N,).
        denominator: N > 0, in place of the number of positions ("token-mean") or rows that a mean divides by. With that
            of all micro-batches and processes their losses, and gradients, add up exactly to those of the whole batch.

    Returns:
        The scalar loss (0 when nothing is unmasked), and scalar statistics over unmasked positions, without gradient:
        ``ratio_mean``; ``ratio_max_deviation``, the largest |ρ − 1|; ``approx_kl``, the mean of (ρ − 1) − log ρ, an
        estimate of KL(π_old ‖ π) in nats; ``clip_fraction``, the share of positions where −clip(ρ)·A is the larger
        loss, and so the one chosen. A ρ outside the range is not counted where clipping does not change the loss, and
        ``dual_clip`` is not counted either. TRL and verl count in the same way.

    Raises:
        TypeError: an argument is not a tensor of a dtype above.
        ValueError: shapes or devices differ, an option is out of range, or (looked at on the CPU only) a mask holds
            something besides 0 and 1.
    """
    mask = _check_tokens(("logprobs", logprobs), ("old_logprobs", old_logprobs), ("advantages", advantages), mask)
    clipping = check_clipping(clip_range, clip_range_high, dual_clip)
    reduction, denominator = check_reduction(reduction, denominator, logprobs.dim())
    backend = choose("ppo_policy_loss", logprobs, old_logprobs, advantages)
    wanted = checks.read_mask(backend, "mask", mask)
    arguments = (logprobs, old_logprobs, advantages, wanted, *clipping, reduction, denominator)
    if backend == "reference":
        return reference.ppo_policy_loss(*arguments)
    loss, statistics, _ = call(backend, "ppo_policy_loss", *arguments, needs_gradient(logprobs))
    return loss, OPS["ppo_policy_loss"].named(statistics)


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
    mask = _check_tokens(("values", values), ("old_values", old_values), ("returns", returns), mask)
    if clip_range is not None:
        clip_range = checks.number("clip_range", clip_range, 0.0, exclusive_low=True)
    reduction, denominator = check_reduction(reduction, denominator, values.dim())
    backend = choose("ppo_value_loss", values, old_values, returns)
    wanted = checks.read_mask(backend, "mask", mask)
    arguments = (values, old_values, returns, wanted, clip_range, reduction, denominator)
    if backend == "reference":
        return reference.ppo_value_loss(*arguments)
    loss, statistics, _ = call(backend, "ppo_value_loss", *arguments, needs_gradient(values))
    return loss, OPS["ppo_value_loss"].named(statistics)


def _check_tokens(
    first: tuple[str, Tensor], second: tuple[str, Tensor], third: tuple[str, Tensor], mask: Tensor | None
) -> Tensor:
    name, like = first
    checks.tensor(name, like, checks.FLOATS)
    if like.dim() not in (1, 2):
        raise ValueError(f"{name}: has shape {tuple(like.shape)}, must be (B, T) or (N,)")
    for other, value in (second, third):
        checks.tensor(other, value, checks.FLOATS, like)
        checks.shape(other, value, like.shape, f"the shape of {name}")
    return checks.mask("mask", mask, like, like.shape)


def check_clipping(
    clip_range: float, clip_range_high: float | None, dual_clip: float | None
) -> tuple[float, float, float | None]:
    """The clipping options of the policy loss as its kernels take them: ε, ε_high and c."""
    low = high = checks.number("clip_range", clip_range, 0.0, 1.0, exclusive_low=True)
    if clip_range_high is not None:
        high = checks.number("clip_range_high", clip_range_high, 0.0, 1.0, exclusive_low=True)
    if dual_clip is not None:
        dual_clip = checks.number("dual_clip", dual_clip, 1.0, exclusive_low=True)
    return low, high, dual_clip


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
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, wanted: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None, reduction: str, denominator: float | None, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _results("ppo_policy_loss", logprobs, with_gradient)


@fake("ppo_value_loss")
def _(
    values: Tensor, old_values: Tensor, returns: Tensor, wanted: Tensor, clip_range: float | None, reduction: str,
    denominator: float | None, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _results("ppo_value_loss", values, with_gradient)


autograd_of_loss("ppo_policy_loss", "logprobs")
autograd_of_loss("ppo_value_loss", "values")
