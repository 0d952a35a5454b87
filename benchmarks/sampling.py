"""Tokens drawn from logits, with their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bounds import Work
from cases import FORWARD, MODES, Case, Implementation, Inputs, ours
from log_prob import log_probs
from torch import Tensor

import rlhf_kernels

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}

# Rows, and the vocabulary of GPT-2 or Qwen 3.
SIZES = {
    "cpu": ((32, 50_257), (512, 50_257), (32, 151_936), (512, 151_936)),
    "cuda": ((32, 151_936), (512, 151_936)),
    "quick": ((32, 50_257),),
}
TAKES = ("logits", "stream")


def cases(scale: str) -> list[Case]:
    """The op at each size. Others draw other tokens, so that only its own error can be given."""
    return [
        Case(
            "sample_tokens",
            f"N={rows} V={size}",
            partial(_inputs, rows, size),
            TAKES,
            sample_tokens,
            (
                ours(sample_tokens),
                Implementation("selective_log_softmax alone", _log_probs_alone, compared=False),
                Implementation("eager", lambda: multinomial, compiles=MODES[:1], compared=False),
                Implementation("eager, vLLM's steps", lambda: exponential_race, compiles=MODES[:1], compared=False),
            ),
            lambda inputs, _: Work(read=inputs["logits"].nbytes),
            steps=(FORWARD,),
            rows=TAKES,
            chunk=32,
            sample=64,
        )
        for rows, size in SIZES[scale]
    ]


def _inputs(rows: int, size: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    device = generator.device
    logits = torch.randn(rows, size, generator=generator, device=device).mul_(4).to(dtype)
    return {"logits": logits, "stream": torch.arange(rows, device=device)}


def sample_tokens(logits: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
    """As a rollout calls it."""
    return rlhf_kernels.sample_tokens(logits, seed=0, stream=stream, step=7)


def _log_probs_alone() -> Callable[[Tensor, Tensor], Tensor]:
    """Of tokens that are given; ``stream`` serves as these."""
    return rlhf_kernels.selective_log_softmax


def multinomial(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers of their own draw a token, and as transformers does."""
    tokens = torch.multinomial(logits.float().softmax(-1), 1).squeeze(-1)
    return tokens, log_probs(logits, tokens)


def exponential_race(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """The token with the largest p/x, where x is exponentially distributed, has probability p."""
    probabilities = logits.float().softmax(-1)
    tokens = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    return tokens, log_probs(logits, tokens)


def variants() -> Iterator[Callable[[], Any]]:
    """Calls which together launch every Triton kernel of the family as training does."""
    stream = torch.zeros(64, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.zeros(64, 50_304, dtype=dtype)
        for temperature in (1.0, 0.0):
            yield lambda x=logits, t=temperature: rlhf_kernels.sample_tokens(
                x, seed=0, stream=stream, step=0, temperature=t
            )
