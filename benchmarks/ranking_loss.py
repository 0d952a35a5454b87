"""The reward model's loss over all pairs of each prompt's completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import batches
import torch
import torch.nn.functional as F
from bounds import Work
from cases import BACKWARD, FORWARD, Case, Inputs, eager, ours
from torch import Tensor

import rlhf_kernels

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32,)}

# Prompts, and completions of each prompt. 9 is the most that the labellers of InstructGPT ranked.
SIZES = {"cpu": (4096, 9), "cuda": (65_536, 9), "quick": (256, 9)}


def cases(scale: str) -> list[Case]:
    """The one op."""
    prompts, completions = SIZES[scale]
    op = rlhf_kernels.pairwise_ranking_loss
    return [
        Case(
            op.__name__,
            f"B={prompts} K={completions}",
            partial(_inputs, prompts, completions),
            ("scores", "ranks"),
            op,
            (ours(op), eager(ranking_loss)),
            _work,
            gradients=("scores",),
            steps=(FORWARD, BACKWARD) if scale != "quick" else (BACKWARD,),
            adversarial=_adversarial,
        )
    ]


def _inputs(prompts: int, completions: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """Ranks have ties, as labellers give them."""
    shape = (prompts, completions)
    return {
        "scores": batches.normal(shape, generator, dtype),
        "ranks": torch.randint(1, 8, shape, generator=generator, device=generator.device),
    }


def _adversarial(inputs: Inputs) -> Inputs:
    """Scores that are far from 0 compared with their differences, and in every other prompt hundreds apart."""
    scores = inputs["scores"] + 100
    scores[::2] *= 300
    return inputs | {"scores": scores}


def _work(inputs: Inputs, step: str) -> Work:
    size = inputs["scores"].nbytes
    return Work(size + inputs["ranks"].nbytes, 0 if step == FORWARD else size)


def ranking_loss(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """All K² differences of every prompt, of which the pairs in order are kept."""
    scores = scores.float()
    difference = scores[:, :, None] - scores[:, None, :]
    pairs = (ranks[:, :, None] < ranks[:, None, :]).float()
    count = pairs.sum((1, 2))
    prompts = (count > 0).float()
    losses = -(F.logsigmoid(difference) * pairs).sum((1, 2)) / count.clamp(min=1)
    right = (((difference > 0).float() + 0.5 * (difference == 0).float()) * pairs).sum((1, 2)) / count.clamp(min=1)
    return (losses * prompts).sum() / prompts.sum(), ((right * prompts).sum() / prompts.sum()).detach()


def variants() -> Iterator[Callable[[], Any]]:
    """Calls which together launch every Triton kernel of the family as training does."""
    scores, ranks = torch.zeros(64, 9, requires_grad=True), torch.zeros(64, 9, dtype=torch.int64)
    op, offsets, mask = rlhf_kernels.pairwise_ranking_loss, torch.arange(0, 64 * 9 + 1, 9), torch.ones(64, 9)
    yield lambda: op(scores, ranks, mask=mask)
    yield lambda: op(scores.flatten(), ranks.flatten(), offsets=offsets)
