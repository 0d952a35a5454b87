"""Per-token KL penalties, and the rewards that PPO sees: the penalty at every token, the score at the last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import choose
from rlhf_kernels.reference import kl_reward as reference
from rlhf_kernels.registration import autograd, call, fake, run_kernel

ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None = None, *, estimator: str = "k1") -> Tensor:
    """A per-token estimate of KL(π ‖ π_ref) from samples of π (Schulman 2020, "Approximating KL divergence").

    With d = log π − log π_ref: k1 = d, unbiased, and the penalty of Ouyang et al. 2022, equation 2; k2 = d²/2, low
    variance, biased; k3 = e^(−d) − 1 + d, unbiased, never negative; abs = |d|. Differentiable in both arguments.

    Args:
        logprobs: (...) floating point: log-probs of the sampled tokens under π, in nats.
        ref_logprobs: (...) the same under π_ref.
        mask: (...) bool or {0, 1}: masked positions give 0 and zero gradient, whatever is there: padding is −100 from
            some trainers and 0 from others, and e^100 is infinite. None: every position counts.
        estimator: "k1", "k2", "k3" or "abs".

    Returns:
        (...) float32 (float64 for float64 inputs), in nats.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices differ, the estimator is unknown, or (looked at on the CPU only) a mask holds
            something besides 0 and 1.
    """
    _check(logprobs, ref_logprobs, estimator)
    checks.mask("mask", mask, logprobs, logprobs.shape)
    backend = choose("kl_penalty", logprobs, ref_logprobs)
    mask = checks.to_be_kept(checks.read_mask(backend, "mask", mask, logprobs))
    if backend == "reference":
        return reference.kl_penalty(logprobs, ref_logprobs, mask, estimator)
    if logprobs.dim() in (1, 2):
        return call(backend, "kl_penalty", logprobs, ref_logprobs, mask, estimator)
    mask = None if mask is None else mask.reshape(-1)
    flat = call(backend, "kl_penalty", logprobs.reshape(-1), ref_logprobs.reshape(-1), mask, estimator)
    return flat.view(logprobs.shape)


def kl_shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    *,
    beta: float,
    estimator: str = "k1",
    score_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """r_t = −β·k(t), plus the completion's score at the last unmasked position of its row.

    Ouyang et al. 2022, equation 2, taken per token as in Stiennon et al. 2020. Rewards are targets: no gradient
    flows through them.

    Args:
        scores: (B,) floating point: the reward model's scores, one per completion.
        logprobs: (B, T) floating point: log-probs of the sampled tokens under the policy.
        ref_logprobs: (B, T) the same under the reference.
        mask: (B, T) bool or {0, 1}: which positions are response tokens; padding on either side, holes
            allowed. None: all of them.
        beta: β ≥ 0, in units of reward per nat.
        estimator: as for :func:`kl_penalty`.
        score_clip: c > 0 limits scores to [−c, c].

    Returns:
        Two (B, T) float32 (float64 for float64 inputs) tensors, 0 where masked: the rewards, and k(t) in nats. The
        score of a row with nothing unmasked is dropped.

    Raises:
        TypeError: an argument is not a tensor of a dtype above.
        ValueError: shapes or devices differ, an option is out of range, or (looked at on the CPU only) a mask holds
            something besides 0 and 1.
    """
    _check(logprobs, ref_logprobs, estimator)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs: has shape {tuple(logprobs.shape)}, must be (B, T)")
    checks.mask("mask", mask, logprobs, logprobs.shape)
    beta, score_clip = check_shaping(scores, logprobs, logprobs.shape[0], beta, score_clip)
    backend = choose("kl_shaped_rewards", scores, logprobs, ref_logprobs)
    mask = checks.read_mask(backend, "mask", mask, logprobs)
    arguments: tuple[Any, ...] = (scores, logprobs, ref_logprobs, mask, beta, estimator, score_clip)
    if backend == "reference":
        return reference.kl_shaped_rewards(*arguments)
    return call(backend, "kl_shaped_rewards", *arguments)


def _check(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> None:
    checks.choice("estimator", estimator, ESTIMATORS)
    checks.tensor("logprobs", logprobs, checks.FLOATS)
    checks.tensor("ref_logprobs", ref_logprobs, checks.FLOATS, logprobs)
    checks.shape("ref_logprobs", ref_logprobs, logprobs.shape, "the shape of logprobs")


def check_shaping(
    scores: Tensor, like: Tensor, count: int, beta: float, score_clip: float | None
) -> tuple[float, float | None]:
    """Checks the arguments that shape rewards, besides the log-probs; returns β and the clip."""
    checks.tensor("scores", scores, checks.FLOATS, like)
    checks.shape("scores", scores, (count,), "one per completion")
    beta = checks.number("beta", beta, 0.0)
    if score_clip is not None:
        score_clip = checks.number("score_clip", score_clip, 0.0, exclusive_low=True)
    return beta, score_clip


@fake("kl_penalty")
def _(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=torch.float32)


@fake("kl_penalty_backward")
def _(logprobs: Tensor, *_: Any) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=torch.float32)


@fake("kl_shaped_rewards")
def _(scores: Tensor, logprobs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(logprobs.new_empty(logprobs.shape, dtype=torch.float32) for _ in range(2))


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.estimator = inputs.estimator
    ctx.save_for_backward(inputs.logprobs, inputs.ref_logprobs, inputs.mask)


@autograd("kl_penalty", _save, variables=("logprobs", "ref_logprobs"))
def _backward(ctx: Any, saved: tuple[Any, ...], gradient: Tensor) -> dict[str, Tensor]:
    logprobs, ref_logprobs, mask = saved
    slope = run_kernel(ctx.backend, "kl_penalty_backward", logprobs, ref_logprobs, mask, ctx.estimator, gradient)
    return {"logprobs": slope.to(logprobs.dtype), "ref_logprobs": -slope.to(ref_logprobs.dtype)}
