"""Generalized advantage estimation, against the loops over T that trainers run.

Two rules are in use. verl's rule, like ours, skips masked positions, so that value and advantage are carried over a
hole. OpenRLHF's rule does not handle holes, so it is compared where only padding is masked. The loops here take the
same steps in our own code. The trainers' own functions are measured too where they can be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import batches
import kl_reward
import torch
from bounds import Work
from cases import MODES, Case, Implementation, Inputs, eager, ours
from torch import Tensor

import rlhf_kernels

DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32,)}

# Sequences and response positions. The first size is compared with every peer; the others show how the cost grows.
SIZES = {
    "cpu": ((64, 1024), (256, 1024), (1024, 1024), (4096, 1024), (16_384, 1024)),
    "cuda": ((512, 4096), (8, 32_768)),
    "quick": ((16, 64), (64, 64)),
}
# A loop over T is left out for more positions than this, because it takes too long on a CPU. torch.compile of a loop is
# left out for more steps than this, since it unrolls the loop.
LONGEST_LOOP = {"cpu": 1 << 20, "cuda": 1 << 40, "quick": 1 << 20}
LONGEST_COMPILED = {"cpu": 128, "cuda": 1024, "quick": 0}
GAMMA, LAM = 1.0, 0.95
TAKES = ("rewards", "values", "mask")


def cases(scale: str) -> list[Case]:
    """Both rules, whitening, the whole of PPO's advantages, and masked_gae again at growing sizes."""
    first, *growing = SIZES[scale]
    compiled = first[1] <= LONGEST_COMPILED[scale]
    loop, compiled_loop = (eager(verl_rule, TAKES, compiles=modes, whose="verl's") for modes in ((), MODES[:1]))
    remark = "" if compiled else "torch.compile of the loops over T is left out: it takes 0.3 s per position"
    return [
        _case("masked_gae", first, compiled_loop if compiled else loop, remark=remark),
        _case("masked_gae, padding only", first, *_openrlhf(), holes=False),
        _case("masked_gae whitened", first, *_verl(), whiten="unbiased"),
        _ppo_advantages(first),
        *(
            _case("masked_gae", size, *([loop] if size[0] * size[1] <= LONGEST_LOOP[scale] else []), hostile=False)
            for size in growing
        ),
    ]


def _case(
    name: str,
    size: tuple[int, int],
    *peers: Implementation,
    holes: bool = True,
    whiten: bool | str = False,
    remark: str = "",
    hostile: bool = True,
) -> Case:
    op = partial(rlhf_kernels.masked_gae, gamma=GAMMA, lam=LAM, whiten=whiten)
    batch, length = size
    make = partial(_inputs, batch, length, holes)
    # The least that an op with two new tensors as results can take: it reads its inputs and writes into fresh pages.
    bare = Implementation("bare read and write", lambda: _copies, ("rewards", "values"), compared=False)
    return Case(
        name,
        f"B={batch} T={length}",
        make,
        TAKES,
        op,
        (ours(op), bare, *peers),
        work,
        valid=_mask,
        remark=remark,
        adversarial=_adversarial if hostile else None,
    )


def _copies(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return rewards.clone(), values.clone()


def _ppo_advantages(size: tuple[int, int]) -> Case:
    batch, length = size
    op = partial(rlhf_kernels.ppo_advantages, beta=kl_reward.BETA, gamma=GAMMA, lam=LAM)
    takes = ("scores", "logprobs", "ref_logprobs", "values", "mask")
    return Case(
        "ppo_advantages",
        f"B={batch} T={length}",
        partial(_inputs, batch, length, True),
        takes,
        op,
        (ours(op), eager(advantages_of_scores, compiles=())),
        lambda inputs, _: Work(3 * inputs["values"].nbytes + inputs["mask"].nbytes, 16 * inputs["mask"].numel()),
        valid=_mask,
        adversarial=_adversarial,
        remark="torch.compile of ppo_advantages is left out: it would write out a loop over T",
    )


def _openrlhf() -> tuple[Implementation, ...]:
    return (
        eager(openrlhf_rule, TAKES, compiles=(), whose="OpenRLHF's"),
        Implementation("OpenRLHF", _load_openrlhf, TAKES, install="openrlhf"),
    )


def _verl() -> tuple[Implementation, ...]:
    return (
        eager(whitened_verl_rule, TAKES, compiles=(), whose="verl's"),
        Implementation("verl", _load_verl, TAKES, install="verl"),
    )


def _inputs(batch: int, length: int, holes: bool, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    shape = (batch, length)
    mask = batches.ragged_mask(batch, length, generator, holes=holes)
    logprobs, ref_logprobs = batches.log_probs(shape, generator, dtype)
    return {
        "rewards": batches.normal(shape, generator, dtype),
        "values": batches.normal(shape, generator, dtype),
        "mask": mask,
        "scores": batches.normal((batch,), generator, dtype),
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
    }


def _adversarial(inputs: Inputs) -> Inputs:
    """Rewards with spikes, and values that are far from 0 compared with their differences."""
    rewards = inputs["rewards"].clone()
    rewards[:, ::97] *= 1e5
    return inputs | {"rewards": rewards, "values": inputs["values"] + 1e4}


def _mask(inputs: Inputs) -> Tensor:
    return inputs["mask"] != 0


def work(inputs: Inputs, step: str) -> Work:
    """Rewards, values and the mask are read, and two tensors written."""
    return Work(2 * inputs["values"].nbytes + inputs["mask"].nbytes, 8 * inputs["mask"].numel())


def verl_rule(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Every step computes its position as if it counted, then blends the result with what was carried so far."""
    carried_value, carried = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    found = []
    for t in range(values.shape[1] - 1, -1, -1):
        kept = mask[:, t]
        delta = rewards[:, t] + GAMMA * carried_value - values[:, t]
        here = delta + GAMMA * LAM * carried
        carried_value = values[:, t] * kept + carried_value * (1 - kept)
        carried = here * kept + carried * (1 - kept)
        found.append(carried)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


def whitened_verl_rule(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same, then mean 0 and variance 1 over what is not masked."""
    advantages, returns = verl_rule(rewards, values, mask)
    count = mask.sum()
    centred = advantages - (advantages * mask).sum() / count
    return centred * torch.rsqrt((centred.square() * mask).sum() / (count - 1) + 1e-8), returns


def openrlhf_rule(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards and values are zeroed where masked, and the recursion runs through all positions alike."""
    rewards, values = rewards * mask, values * mask
    length = values.shape[1]
    carried: Tensor | float = 0.0
    found = []
    for t in range(length - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < length else 0.0
        carried = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * carried
        found.append(carried)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


def advantages_of_scores(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    """Shaped rewards, the loop and whitening, one after another."""
    rewards, kl = kl_reward.shaped_rewards(scores, logprobs, ref_logprobs, mask)
    return (*whitened_verl_rule(rewards, values, mask), rewards, kl)


def _load_verl() -> Callable[..., Any]:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    return lambda rewards, values, mask: compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)


def _load_openrlhf() -> Callable[..., Any]:
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    # The method does not use self, so it gets None.
    return lambda rewards, values, mask: RemoteExperienceMaker.get_advantages_and_returns(
        None, values, rewards, mask, GAMMA, LAM
    )


def variants() -> Iterator[Callable[[], Any]]:
    """Calls which together launch every Triton kernel of the family as training does."""
    scores, tokens = torch.zeros(8), torch.zeros(8, 4096)
    flat, boundaries = tokens.view(-1), torch.arange(0, 8 * 4096 + 1, 4096)
    yield partial(rlhf_kernels.masked_gae, tokens, tokens, None, bootstrap=scores, whiten=True)
    yield partial(rlhf_kernels.masked_gae, flat, flat, None, whiten="unbiased", cu_seqlens=boundaries)
    for estimator in ("k1", "k2", "k3", "abs"):
        yield partial(
            rlhf_kernels.ppo_advantages, scores, tokens, tokens, tokens, None, beta=0.1, estimator=estimator,
            score_clip=5.0, whiten=True,
        )  # fmt: skip
