"""Generalized advantage estimation over masked or packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import choose
from rlhf_kernels.kl_reward import ESTIMATORS, check_shaping
from rlhf_kernels.reference import gae as reference
from rlhf_kernels.registration import call, fake


def masked_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    whiten: bool | str = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·V_{t+1} − V_t, over the unmasked positions.

    Schulman et al. 2016, equations 11, 12 and 16. Masked positions are skipped: the value and advantage after a hole
    are carried over it. Advantages and returns are targets: no gradient flows through them.

    Args:
        rewards: (B, T) floating point; or packed (N,), with ``cu_seqlens``.
        values: the same shape: V(s_t), the value model's estimate before token t.
        mask: the same shape, bool or {0, 1}; padding on either side, holes allowed.
            None: every position counts.
        gamma: γ in [0, 1].
        lam: λ in [0, 1].
        bootstrap: (B,) values after the last position, for completions that were cut off; 0 by default.
        whiten: bring the unmasked advantages to mean 0 and variance 1, with 1e-8 added to the variance: True by that of
            the population, Σ(A − Ā)²/n; "unbiased" by Σ(A − Ā)²/(n − 1), as TRL and verl do (one position gives 0).
        cu_seqlens: (B+1,) int32 or int64: where each of B packed sequences begins and ends.

    Returns:
        Two tensors of that shape, float32 (float64 for float64 inputs), 0 where masked: the advantages, and the returns
        A_t + V_t, which are never whitened.

    Raises:
        TypeError: an argument is not a tensor of a dtype above.
        ValueError: shapes or devices differ, an option is out of range, or (looked at on the CPU only) a mask holds
            something besides 0 and 1, or ``cu_seqlens`` don't rise from 0 to N.
    """
    _, gamma, lam, whitening = _check(rewards, values, mask, gamma, lam, bootstrap, whiten, cu_seqlens, "rewards")
    backend = choose("masked_gae", rewards, values, bootstrap)
    mask = checks.read_mask(backend, "mask", mask, rewards)
    cu_seqlens = checks.read_boundaries(backend, "cu_seqlens", cu_seqlens, rewards.shape[0])
    arguments = (rewards, values, mask, gamma, lam, bootstrap, whitening, cu_seqlens)
    if backend == "reference":
        return reference.masked_gae(*arguments)
    return call(backend, "masked_gae", *arguments)


def ppo_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    beta: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool | str = True,
    bootstrap: Tensor | None = None,
    estimator: str = "k1",
    score_clip: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`~rlhf_kernels.kl_shaped_rewards`, then :func:`masked_gae`: all PPO needs of a batch, in one call.

    Args:
        scores: (B,) floating point: the reward model's scores, one per completion.
        logprobs: (B, T) floating point; or packed (N,), with ``cu_seqlens``: log-probs under the policy, in nats.
        ref_logprobs: the same shape: log-probs under the reference.
        values: the same shape: the value model's estimates.
        mask: the same shape, bool or {0, 1}; None: every position counts.
        beta: β ≥ 0, the price of a nat of KL.
        gamma: as for :func:`masked_gae`.
        lam: likewise.
        whiten: likewise.
        bootstrap: likewise.
        estimator: as for :func:`~rlhf_kernels.kl_penalty`.
        score_clip: as for :func:`~rlhf_kernels.kl_shaped_rewards`.
        cu_seqlens: as for :func:`masked_gae`.

    Returns:
        Advantages, returns, rewards and per-token KL, each of the shape of ``logprobs``, float32 (float64 for float64
        inputs), 0 where masked, without gradient.

    Raises:
        TypeError: an argument is not a tensor of a dtype above.
        ValueError: shapes or devices differ, an option is out of range, or (looked at on the CPU only) a mask holds
            something besides 0 and 1, or ``cu_seqlens`` don't rise from 0 to N.
    """
    checks.choice("estimator", estimator, ESTIMATORS)
    count, gamma, lam, whitening = _check(logprobs, values, mask, gamma, lam, bootstrap, whiten, cu_seqlens, "logprobs")
    checks.tensor("ref_logprobs", ref_logprobs, checks.FLOATS, logprobs)
    checks.shape("ref_logprobs", ref_logprobs, logprobs.shape, "the shape of logprobs")
    beta, score_clip = check_shaping(scores, logprobs, count, beta, score_clip)
    backend = choose("ppo_advantages", scores, logprobs, ref_logprobs, values, bootstrap)
    mask = checks.read_mask(backend, "mask", mask, logprobs)
    cu_seqlens = checks.read_boundaries(backend, "cu_seqlens", cu_seqlens, logprobs.shape[0])
    arguments = (
        scores, logprobs, ref_logprobs, values, mask, beta, gamma, lam, whitening, bootstrap, estimator, score_clip,
        cu_seqlens,
    )  # fmt: skip
    if backend == "reference":
        return reference.ppo_advantages(*arguments)
    return call(backend, "ppo_advantages", *arguments)


def _check(
    first: Tensor, values: Tensor, mask: Tensor | None, gamma: float, lam: float, bootstrap: Tensor | None,
    whiten: bool | str, cu_seqlens: Tensor | None, name: str,
) -> tuple[int, float, float, str | None]:  # fmt: skip
    """Checks what both functions share; returns the number of sequences, γ, λ, and what to whiten by."""
    checks.tensor(name, first, checks.FLOATS)
    dims, form = (2, "(B, T)") if cu_seqlens is None else (1, "(N,), since cu_seqlens is given")
    if first.dim() != dims:
        hint = "; give cu_seqlens for packed sequences" if first.dim() == 1 else ""
        raise ValueError(f"{name}: has shape {tuple(first.shape)}, must be {form}{hint}")
    checks.tensor("values", values, checks.FLOATS, first)
    checks.shape("values", values, first.shape, f"the shape of {name}")
    if cu_seqlens is not None:
        checks.boundaries("cu_seqlens", cu_seqlens, first)
        count = cu_seqlens.shape[0] - 1
    else:
        count = first.shape[0]
    checks.mask("mask", mask, first, first.shape)
    gamma, lam = checks.number("gamma", gamma, 0.0, 1.0), checks.number("lam", lam, 0.0, 1.0)
    if not isinstance(whiten, bool) and whiten != "unbiased":
        raise ValueError(f"whiten: is {whiten!r}, must be True, False or 'unbiased'")
    if bootstrap is not None:
        checks.tensor("bootstrap", bootstrap, checks.FLOATS, first)
        checks.shape("bootstrap", bootstrap, (count,), "one per sequence")
    whitening = "unbiased" if whiten == "unbiased" else "population" if whiten else None
    return count, gamma, lam, whitening


@fake("masked_gae")
def _(rewards: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(rewards.new_empty(rewards.shape, dtype=torch.float32) for _ in range(2))


@fake("ppo_advantages")
def _(scores: Tensor, logprobs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(logprobs.new_empty(logprobs.shape, dtype=torch.float32) for _ in range(4))
