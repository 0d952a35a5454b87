"""PPO's losses for the policy and the value model, with the statistics that trainers log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import batches
import torch
from bounds import Work
from cases import BACKWARD, FORWARD, Case, Implementation, Inputs, eager, ours
from torch import Tensor

import rlhf_kernels

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32,)}

# Sequences and response positions.
SIZES = {"cpu": (64, 1024), "cuda": (512, 4096), "quick": (16, 128)}
CLIP = 0.2


def cases(scale: str) -> list[Case]:
    """Both losses."""
    batch, length = SIZES[scale]
    policy, value = rlhf_kernels.ppo_policy_loss, rlhf_kernels.ppo_value_loss
    steps = (FORWARD, BACKWARD) if scale != "quick" else (BACKWARD,)
    takes = {
        policy: ("logprobs", "old_logprobs", "advantages", "mask"),
        value: ("values", "old_values", "returns", "mask"),
    }
    return [
        Case(
            op.__name__,
            f"B={batch} T={length}",
            partial(inputs, batch, length),
            takes[op],
            op,
            (ours(op), eager(formula), peer),
            work,
            gradients=takes[op][:1],
            steps=steps,
            adversarial=_adversarial,
        )
        for op, formula, peer in (
            # verl's ratios are clamped, and its surrogate is always clipped twice: another loss on adversarial inputs.
            (policy, policy_loss, Implementation("verl", _verl_policy_loss, install="verl", compared=False)),
            (value, value_loss, Implementation("verl", _verl_value_loss, install="verl")),
        )
    ]


def inputs(batch: int, length: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """What either loss is called with."""
    shape = (batch, length)
    logprobs, old_logprobs = batches.log_probs(shape, generator, dtype)
    values = batches.normal(shape, generator, torch.float32)
    return {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "advantages": batches.normal(shape, generator, dtype),
        "values": values.to(dtype),
        "old_values": (values + batches.normal(shape, generator, torch.float32, 0.2)).to(dtype),
        "returns": (values + batches.normal(shape, generator, torch.float32)).to(dtype),
        "mask": batches.ragged_mask(batch, length, generator),
    }


def _adversarial(inputs: Inputs) -> Inputs:
    """Ratios from e^−20 to e^20, large advantages, and values that are far from 0 compared with their differences."""
    drift = torch.linspace(-20, 20, inputs["mask"].shape[1], device=inputs["mask"].device)
    return inputs | {
        "old_logprobs": (inputs["old_logprobs"] + drift).to(inputs["old_logprobs"].dtype),
        "advantages": inputs["advantages"] * 1e3,
        **{name: inputs[name] + 1e3 for name in ("values", "old_values", "returns")},
    }


def work(inputs: Inputs, step: str) -> Work:
    """Three tensors and the mask are read once; the gradient can be written in the same pass."""
    size = inputs["values"].nbytes
    return Work(3 * size + inputs["mask"].nbytes, 0 if step == FORWARD else size)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The masked mean as trainers write it."""
    return (values * mask).sum() / mask.sum()


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, token by token, then one mean for each thing that is logged."""
    advantages = advantages.float()
    log_ratio = logprobs.float() - old_logprobs.float()
    ratio = torch.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
    loss = masked_mean(torch.maximum(plain, clipped), mask)
    with torch.no_grad():
        stats = {
            "ratio_mean": masked_mean(ratio, mask),
            "ratio_max_deviation": ((ratio - 1).abs() * mask).max(),
            "approx_kl": masked_mean(ratio - 1 - log_ratio, mask),
            "clip_fraction": masked_mean((clipped > plain).float(), mask),
        }
    return loss, stats


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The larger of two squared errors, and its statistics."""
    values, old_values, returns = values.float(), old_values.float(), returns.float()
    near = torch.clamp(values, old_values - CLIP, old_values + CLIP)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask)
    with torch.no_grad():
        stats = {
            "value_mean": masked_mean(values, mask),
            "return_mean": masked_mean(returns, mask),
            "clip_fraction": masked_mean((clipped > plain).float(), mask),
        }
    return loss, stats


def verl_config() -> Any:
    """verl's settings of an actor, which its policy loss reads."""
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)


def _verl_policy_loss() -> Callable[..., Any]:
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    config = verl_config()
    return lambda new, old, advantages, mask: compute_policy_loss_vanilla(old, new, advantages, mask, config=config)[0]


def _verl_value_loss() -> Callable[..., Any]:
    from verl.trainer.ppo.core_algos import compute_value_loss

    return lambda values, old, returns, mask: compute_value_loss(values, returns, old, mask, CLIP)[0]


def variants() -> Iterator[Callable[[], Any]]:
    """Calls which together launch every Triton kernel of the family as training does."""
    tokens, other = torch.zeros(8, 4096, requires_grad=True), torch.zeros(8, 4096)
    for reduction in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        for dual_clip in (None, 3.0):
            yield partial(
                rlhf_kernels.ppo_policy_loss, tokens, other, other, None, dual_clip=dual_clip, reduction=reduction
            )
        for options in (
            {"surrogate": "cispo"},
            {"ratio_level": "sequence"},
            {"ref_logprobs": other, "beta": 0.1, "log_ratio_clamp": 20.0},
        ):
            yield partial(rlhf_kernels.ppo_policy_loss, tokens, other, other, None, reduction=reduction, **options)
        for clip in (None, 0.2):
            yield partial(rlhf_kernels.ppo_value_loss, tokens, other, other, None, clip_range=clip, reduction=reduction)
