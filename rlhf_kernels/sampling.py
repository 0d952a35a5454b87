"""Tokens drawn from logits, with their log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import choose
from rlhf_kernels.reference import sampling as reference
from rlhf_kernels.registration import call, fake


def sample_tokens(
    logits: Tensor, *, seed: int, stream: Tensor | int, step: Tensor | int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draws a token from softmax(logits / temperature) in each row; also gives its log-prob, from the same pass.

    A row's token is a function of its logits, ``seed``, ``stream`` and ``step``, and of nothing else: not of the rows
    beside it, the number of threads or torch's generators. Philox-4x32-10 (Salmon et al. 2011), keyed by ``seed`` and
    with ``stream`` and ``step`` as its counter, gives one number u of 53 bits, 0 < u < 1. The token is the first, in
    the order of the vocabulary, at which the cumulated probability is above u. So all backends draw the same token,
    unless u lies within their rounding of a boundary. A token of probability 0, as of a logit of −inf, is never drawn.

    For top-k, top-p and the like, set the other logits to −inf first, as the logits processors of transformers do.

    Args:
        logits: (..., V) float32, bfloat16, float16 (or float64); any strides with a unit last stride.
        seed: any int64.
        stream: (...) int64 or int32, or an int for all rows: which sequence this is, such as the episode's number.
        step: likewise: which token of the sequence.
        temperature: τ ≥ 0. 0 takes the first of the largest logits, and gives its log-prob at τ = 1.

    Returns:
        (...) int64 tokens and (...) float32 (float64 for float64 logits) log-probabilities in nats, without gradient:
        those that :func:`~rlhf_kernels.selective_log_softmax` gives for these tokens, bit for bit.

    Raises:
        TypeError: an argument has another type, or a tensor a dtype not listed above.
        ValueError: shapes or devices differ, a number is out of range, or (on the CPU) a row holds NaN or +inf, or
            −inf alone. On a GPU such a row gives token −1 and a log-prob of NaN.
    """
    checks.logits(logits)
    seed = checks.int64("seed", seed)
    temperature = checks.temperature(temperature, zero=True)
    streams, steps = _per_row("stream", stream, logits), _per_row("step", step, logits)
    backend = choose("sample_tokens", logits)
    if backend == "reference":
        streams, steps = (x.to(logits.device).expand(logits.shape[:-1]) for x in (streams, steps))
        tokens, logprobs = reference.sample_tokens(logits.detach(), streams, steps, seed, temperature)
    else:
        tokens, logprobs = call(backend, "sample_tokens", logits.detach(), streams, steps, seed, temperature)
    return checks.read_drawn(backend, tokens), logprobs


def _per_row(name: str, value: Any, logits: Tensor) -> Tensor:
    """One for each row; or for all rows a scalar on the CPU, which costs a GPU no launch."""
    rows = logits.shape[:-1]
    if isinstance(value, Tensor):
        checks.tensor(name, value, checks.INDICES, logits)
        checks.shape(name, value, rows, "one entry per row")
        return value
    if torch.compiler.is_compiling():  # a CPU tensor in its graph would keep a compiler from recording CUDA graphs
        return torch.full(rows, checks.int64(name, value), dtype=torch.int64, device=logits.device)
    return torch.scalar_tensor(checks.int64(name, value), dtype=torch.int64, device="cpu")


@fake("sample_tokens")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)
