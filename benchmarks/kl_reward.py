"""KL penalties per token, and the rewards that PPO sees."""

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
BETA = 0.02


def cases(scale: str) -> list[Case]:
    """The penalty alone, and the shaped rewards."""
    batch, length = SIZES[scale]
    size = f"B={batch} T={length}"
    make = partial(_inputs, batch, length)
    penalty = partial(rlhf_kernels.kl_penalty, estimator="k3")
    rewards = partial(rlhf_kernels.kl_shaped_rewards, beta=BETA)
    return [
        Case(
            "kl_penalty k3",
            size,
            make,
            ("logprobs", "ref_logprobs"),
            penalty,
            # verl's k3 is clamped at 10: another penalty on adversarial inputs.
            (ours(penalty), eager(k3), Implementation("verl", _verl_k3, install="verl", compared=False)),
            _penalty_work,
            gradients=("logprobs", "ref_logprobs"),
            steps=(FORWARD, BACKWARD) if scale != "quick" else (BACKWARD,),
            adversarial=_adversarial,
        ),
        Case(
            "kl_shaped_rewards",
            size,
            make,
            ("scores", "logprobs", "ref_logprobs", "mask"),
            rewards,
            (ours(rewards), eager(shaped_rewards)),
            _rewards_work,
            adversarial=_adversarial,
        ),
    ]


def _inputs(batch: int, length: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    logprobs, ref_logprobs = batches.log_probs((batch, length), generator, dtype)
    return {
        "scores": batches.normal((batch,), generator, dtype),
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "mask": batches.ragged_mask(batch, length, generator),
    }


def _adversarial(inputs: Inputs) -> Inputs:
    """Log-ratios so small that k3 subtracts nearly equal numbers, and others so large that its exponential is huge."""
    first = inputs["logprobs"].float()
    small = torch.linspace(-1e-3, 1e-3, first.shape[1], device=first.device)
    far = torch.linspace(-20, 20, first.shape[1], device=first.device)
    even = torch.arange(first.shape[0], device=first.device)[:, None] % 2 == 0
    return inputs | {"ref_logprobs": (first + torch.where(even, small, far)).to(inputs["logprobs"].dtype)}


def _penalty_work(inputs: Inputs, step: str) -> Work:
    size, count = inputs["logprobs"].nbytes, inputs["logprobs"].numel()
    forward = Work(2 * size, 4 * count)
    return forward if step == FORWARD else Work(forward.read + 2 * size + 4 * count, forward.written + 2 * size)


def _rewards_work(inputs: Inputs, step: str) -> Work:
    return Work(2 * inputs["logprobs"].nbytes + inputs["mask"].nbytes, 8 * inputs["mask"].numel())


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 as trainers with a KL term in the loss write it."""
    difference = ref_logprobs.float() - logprobs.float()
    return torch.exp(difference) - difference - 1


def _verl_k3() -> Callable[..., Any]:
    from verl.trainer.ppo.core_algos import kl_penalty_forward

    return lambda logprobs, ref_logprobs: kl_penalty_forward(logprobs, ref_logprobs, "k3")


def shaped_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A penalty at every token, and the score put at the last one by index."""
    kl = (logprobs.float() - ref_logprobs.float()) * mask
    rewards = -BETA * kl
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
    return rewards.scatter_add(1, last[:, None], scores.float()[:, None]), kl


def variants() -> Iterator[Callable[[], Any]]:
    """Calls which together launch every Triton kernel of the family as training does."""
    logprobs, ref_logprobs = torch.zeros(2, 8, 4096, requires_grad=True)
    for estimator in ("k1", "k2", "k3", "abs"):
        for mask in (None, torch.ones(8, 4096)):
            yield partial(rlhf_kernels.kl_penalty, logprobs, ref_logprobs, mask, estimator=estimator)
        yield partial(
            rlhf_kernels.kl_shaped_rewards, torch.zeros(8), logprobs, ref_logprobs, None, beta=0.1,
            estimator=estimator, score_clip=5.0,
        )  # fmt: skip
