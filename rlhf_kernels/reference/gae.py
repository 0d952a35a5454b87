"""A_t = δ_t + γλ·A_{t+1}, δ_t = r_t + γ·V_{t+1} − V_t, from the last position to the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.reference import kl_reward
from rlhf_kernels.reference.common import common_dtype, pad, slots_of

VARIANCE_EPS = 1e-8


# Compilers see these as ops. They could trace neither the loop over positions nor a padded length that depends on data.
@torch.library.custom_op("rlhf_kernels::reference_masked_gae", mutates_args=())
def _masked_gae(
    rewards: Tensor, values: Tensor, wanted: Tensor, gamma: float, lam: float, bootstrap: Tensor | None,
    whiten: str | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = common_dtype(rewards, values, bootstrap)
    rewards, values = rewards.to(dtype), values.to(dtype)
    if cu_seqlens is None:
        return _rows(rewards, values, wanted, gamma, lam, bootstrap, whiten)
    slots = slots_of(cu_seqlens)
    padded = _rows(pad(rewards, slots), pad(values, slots), pad(wanted, slots), gamma, lam, bootstrap, whiten)
    return padded[0][slots], padded[1][slots]


@torch.library.custom_op("rlhf_kernels::reference_ppo_advantages", mutates_args=())
def _ppo_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, wanted: Tensor, beta: float, gamma: float,
    lam: float, whiten: str | None, bootstrap: Tensor | None, estimator: str, score_clip: float | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = common_dtype(scores, logprobs, ref_logprobs, values, bootstrap)
    scores, logprobs, ref_logprobs, values = (x.to(dtype) for x in (scores, logprobs, ref_logprobs, values))
    if cu_seqlens is not None:
        slots = slots_of(cu_seqlens)
        logprobs, ref_logprobs, values, wanted = (pad(x, slots) for x in (logprobs, ref_logprobs, values, wanted))
    rewards, kl = kl_reward.kl_shaped_rewards(scores, logprobs, ref_logprobs, wanted, beta, estimator, score_clip)
    advantages, returns = _rows(rewards, values, wanted, gamma, lam, bootstrap, whiten)
    if cu_seqlens is not None:
        return advantages[slots], returns[slots], rewards[slots], kl[slots]
    return advantages, returns, rewards, kl


@_masked_gae.register_fake
def _(
    rewards: Tensor, values: Tensor, wanted: Tensor, gamma: float, lam: float, bootstrap: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    dtype = common_dtype(rewards, values, bootstrap)
    return tuple(rewards.new_empty(rewards.shape, dtype=dtype) for _ in range(2))


@_ppo_advantages.register_fake
def _(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, wanted: Tensor, beta: float, gamma: float,
    lam: float, whiten: str | None, bootstrap: Tensor | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = common_dtype(scores, logprobs, ref_logprobs, values, bootstrap)
    return tuple(logprobs.new_empty(logprobs.shape, dtype=dtype) for _ in range(4))


@torch.no_grad()
def masked_gae(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Advantages and returns, 0 where masked."""
    return _masked_gae(*arguments)


@torch.no_grad()
def ppo_advantages(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards and KL, 0 where masked."""
    return _ppo_advantages(*arguments)


def _rows(
    rewards: Tensor,
    values: Tensor,
    wanted: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None,
    whiten: str | None,
) -> tuple[Tensor, Tensor]:
    """The recursion, for all rows at once."""
    # Masked positions are replaced, not multiplied by 0: they may hold NaN, and 0·NaN is NaN.
    rewards = torch.where(wanted, rewards, 0.0)
    values = torch.where(wanted, values, 0.0)
    advantage = torch.zeros_like(rewards[:, :1].sum(1))
    next_value = advantage if bootstrap is None else bootstrap.to(values.dtype)
    advantages = torch.zeros_like(rewards)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(wanted[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(wanted[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(wanted[:, t], advantage, 0.0)
    returns = torch.where(wanted, advantages + values, 0.0)
    return (advantages if whiten is None else whitened(advantages, wanted, whiten)), returns


def whitened(advantages: Tensor, wanted: Tensor, whiten: str) -> Tensor:
    """Mean 0 and variance 1 over the positions that count."""
    count = wanted.sum().clamp(min=1)
    degrees = (count - 1).clamp(min=1) if whiten == "unbiased" else count
    centred = torch.where(wanted, advantages - advantages.sum() / count, 0.0)
    return torch.where(wanted, centred * torch.rsqrt(centred.square().sum() / degrees + VARIANCE_EPS), 0.0)
