"""Tokens drawn from rows of logits, with their log-probs.

Chunks are summed as for the log-probs. One program per row then finds the chunk that holds the token, and reads that
chunk a second time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.triton.common import rows_of
from rlhf_kernels.triton.log_prob import Which, merged, sum_chunks

ALL = Which(None, None, None)


@triton.jit
def uniform(seed, stream, step):
    """(2k + 1)·2⁻⁵³ with the 52 highest of the 64 bits that words 1 and 0 of Philox-4x32-10 make as k."""
    low, high = stream.to(tl.uint64), step.to(tl.uint64)
    word_0, word_1, _, _ = tl.philox(
        seed, low.to(tl.uint32), (low >> 32).to(tl.uint32), high.to(tl.uint32), (high >> 32).to(tl.uint32)
    )
    bits = ((word_1.to(tl.uint64) << 32) | word_0.to(tl.uint64)) >> 12
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def part_at(target, passed, weights, at):
    """The first part that has a weight and with which the sum passes the target; or the last one that has a weight.

    ``passed`` is the sum of what comes before. Returns the part's number, and the sum of what comes before it.
    """
    cumulated = passed + tl.cumsum(weights, 0)
    has_weight = weights > 0
    first = tl.min(tl.where(has_weight & (cumulated > target), at, 2147483647), 0)
    last = tl.max(tl.where(has_weight, at, 0), 0)
    found = tl.minimum(first, last)
    return found, passed + tl.sum(tl.where(at < found, weights, 0.0), 0)


@triton.jit
def number_of(row, numbers, number):
    """A row's number: its own where there are several, or the one that all share."""
    own = number
    if numbers is not None:
        own = tl.load(numbers + row)
    return tl.cast(own, tl.int64)


@triton.jit(do_not_specialize=["seed", "stream", "step"])
def _draw(
    logits, streams, stream, steps, step, sums, tokens, logprobs, seed, outer_stride, inner_stride, inner, vocabulary,
    chunks, scale, inverse_temperature, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    GREEDY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    top, total, _ = merged(sums + row * chunks * 3, chunks, scale, CHUNKS)
    each = tl.arange(0, CHUNKS)
    tops = tl.load(sums + (row * chunks + each) * 3, mask=each < chunks, other=float("-inf"))
    token = vocabulary
    if total > 0 and total < float("inf"):
        if GREEDY:
            chunk = tl.min(tl.where(tops == top, each, CHUNKS), 0)
            for start in range(0, CHUNK, BLOCK):
                at = chunk * CHUNK + start + tl.arange(0, BLOCK)
                x = tl.load(line + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
                token = tl.minimum(token, tl.min(tl.where(x == top, at, vocabulary), 0))
        else:
            totals = tl.load(sums + (row * chunks + each) * 3 + 1, mask=each < chunks, other=0.0).to(tl.float64)
            shift = tl.where(tops == float("-inf"), float("-inf"), tops.to(tl.float64) - top)
            weights = totals * tl.exp2(shift * scale)
            target = uniform(seed, number_of(row, streams, stream), number_of(row, steps, step)) * tl.sum(weights, 0)
            chunk, passed = part_at(target, 0.0, weights, each)
            # Weights relative to the chunk's own maximum: relative to the row's they might all round to 0.
            own = tl.load(sums + (row * chunks + chunk) * 3)
            factor = tl.exp2((own.to(tl.float64) - top) * scale)
            for start in range(0, CHUNK, BLOCK):
                # A block without a token that passes leaves its last one, for which later blocks are looked at.
                if token == vocabulary or passed <= target:
                    at = chunk * CHUNK + start + tl.arange(0, BLOCK)
                    x = tl.load(line + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
                    e = factor * tl.exp2((x - own) * scale).to(tl.float64)
                    here = tl.sum(e, 0)
                    if here > 0:
                        token, _ = part_at(target, passed, e, at)
                    passed += here
        chosen = tl.load(line + token).to(tl.float32)
        logprob = (chosen.to(tl.float64) - top) * inverse_temperature - tl.log(total)
        tl.store(tokens + row, token)
        tl.store(logprobs + row, logprob.to(tl.float32))
    else:
        tl.store(tokens + row, -1)
        tl.store(logprobs + row, float("nan"))


def sample_tokens(logits: Tensor, stream: Tensor, step: Tensor, seed: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs; −1 and NaN where a row has no distribution."""
    tokens = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(logits.shape[:-1], device=logits.device)
    rows = tokens.numel()
    if rows == 0:
        return tokens, logprobs
    logits = rows_of(logits)
    chunks = sum_chunks(logits, ALL, rows, temperature or 1.0, with_entropy=False)
    _draw[(rows,)](
        logits, *_numbers(stream), *_numbers(step), chunks.sums, tokens, logprobs, seed, *chunks.layout,
        chunks.per_row, chunks.scale, 1.0 / (temperature or 1.0),
        CHUNKS=triton.next_power_of_2(chunks.per_row), CHUNK=chunks.size, BLOCK=chunks.block, GREEDY=temperature == 0,
        num_warps=chunks.warps,
    )  # fmt: skip
    return tokens, logprobs


def _numbers(tensor: Tensor) -> tuple[Tensor | None, int]:
    """A row's own numbers; or none, and the one that all share, which is on the CPU."""
    if tensor.dim() == 0 and tensor.is_cpu:
        return None, int(tensor.item())
    return tensor.contiguous(), 0
