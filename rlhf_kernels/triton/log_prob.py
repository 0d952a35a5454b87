"""Log-prob and entropy of a row in one read of its logits, and the gradient in one read and one write.

A row is cut into chunks of a fixed size, and each chunk is reduced by a program of its own. So a few rows keep the chip
as busy as many do, and the bits of a row do not depend on the batch around it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.triton.common import LN_2, LOG2_E, blocks, dense, rows_of

# Never tuned: the bits of the results depend on these.
CHUNK = 16384
BLOCK = 4096
GRADIENT_BLOCK = 4096


@triton.jit
def reduce_block(x, top, total, weighted, scale, ENTROPY: tl.constexpr):
    """Adds a block of a row's logits to Σ 2^d and Σ 2^d·d with d = (logit − top)·scale.

    top is the maximum so far: the online softmax of Milakov and Gimelshein 2018.
    """
    new = tl.maximum(top, tl.max(x, 0))
    # With nothing but −inf so far, any finite reference will do: these tokens get probability 0.
    reference = tl.where(new == float("-inf"), 0.0, new)
    shift = tl.where(top == float("-inf"), 0.0, (top - reference) * scale)
    factor = tl.exp2(shift)
    d = (x - reference) * scale
    e = tl.exp2(d)
    if ENTROPY:
        weighted = (weighted + shift * total) * factor + tl.sum(e * tl.where(d == float("-inf"), 0.0, d), 0)
    total = total * factor + tl.sum(e, 0)
    return new, total, weighted


@triton.jit
def row_counts(index, mask, ignore_index, row):
    """Whether a row counts. All do that no index, mask or ``ignore_index`` is given for: these are None then."""
    counts = tl.full([], True, tl.int1)
    if mask is not None:
        counts = tl.load(mask + row).to(tl.float32) != 0
    if ignore_index is not None:
        counts = counts & (tl.load(index + row) != ignore_index)
    return counts


@triton.jit
def _chunk_sums(
    logits, index, mask, ignore_index, sums, outer_stride, inner_stride, inner, vocabulary, scale,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if row_counts(index, mask, ignore_index, row):
        line = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
        top = float("-inf")
        total = 0.0
        weighted = 0.0
        for start in range(0, CHUNK, BLOCK):
            at = chunk * CHUNK + start + tl.arange(0, BLOCK)
            x = tl.load(line + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
            top, total, weighted = reduce_block(x, top, total, weighted, scale, ENTROPY)
        to = sums + (row * tl.num_programs(1) + chunk) * 3
        tl.store(to, top)
        tl.store(to + 1, total)
        tl.store(to + 2, weighted)


class Which(NamedTuple):
    """What says which rows count, and which token of each is chosen. None where there is no such thing."""

    tokens: Tensor | None
    mask: Tensor | None
    ignore_index: int | None

    @classmethod
    def of(cls, index: Tensor, mask: Tensor | None, ignore_index: int | None) -> Which:
        """Dense, as the kernels read them."""
        return cls(index.contiguous(), dense(mask), ignore_index)


class Chunks(NamedTuple):
    """The sums of all chunks of all rows, and what a kernel needs to go on with them."""

    sums: Tensor
    """(rows · per_row · 3,) float32."""
    per_row: int
    layout: tuple[int, int, int, int]
    """Outer stride, inner stride, inner size and vocabulary of the logits."""
    scale: float
    """log₂ e / τ."""
    size: int
    """The kernels' CHUNK."""
    block: int
    """The kernels' BLOCK, of which each chunk is a multiple."""
    warps: int


def sum_chunks(logits: Tensor, which: Which, rows: int, temperature: float, *, with_entropy: bool) -> Chunks:
    """Sums the chunks of (outer, inner, V) logits, of which there are ``rows`` rows, at least one."""
    vocabulary = logits.shape[-1]
    block = blocks(vocabulary, BLOCK)
    per_row = triton.cdiv(vocabulary, CHUNK)
    chunks = Chunks(
        torch.empty(rows * per_row * 3, device=logits.device),
        per_row,
        (logits.stride(0), logits.stride(1), logits.shape[1], vocabulary),
        LOG2_E.value / temperature,
        min(CHUNK, block * triton.cdiv(vocabulary, block)),
        block,
        8 if block >= 4096 else 4,
    )
    _chunk_sums[(rows, per_row)](
        logits, *which, chunks.sums, *chunks.layout, chunks.scale, CHUNK=chunks.size, BLOCK=block,
        ENTROPY=with_entropy, num_warps=chunks.warps,
    )  # fmt: skip
    return chunks


@triton.jit
def merged(sums, chunks, scale, CHUNKS: tl.constexpr):
    """The maximum, Σ 2^d and Σ 2^d·d of a row, from those of its chunks; the sums in float64."""
    at = tl.arange(0, CHUNKS)
    here = at < chunks
    tops = tl.load(sums + at * 3, mask=here, other=float("-inf"))
    totals = tl.load(sums + at * 3 + 1, mask=here, other=0.0).to(tl.float64)
    weighted = tl.load(sums + at * 3 + 2, mask=here, other=0.0).to(tl.float64)
    top = tl.max(tops, 0)
    shift = tl.where(tops == float("-inf"), 0.0, (tops.to(tl.float64) - top) * scale)
    # A chunk whose maximum is −inf adds a total of 0, or NaN if it holds one. If the whole row is −inf, the total stays
    # 0, and the log-prob is −inf − (−inf), which is NaN.
    factor = tl.where(tops == float("-inf"), tl.where(top == float("-inf"), 1.0, 0.0), tl.exp2(shift))
    return top, tl.sum(totals * factor, 0), tl.sum((weighted + shift * totals) * factor, 0)


@triton.jit
def _merge(
    logits, index, mask, ignore_index, sums, logprobs, entropies, maxima, log_sums, outer_stride, inner_stride, inner,
    vocabulary, chunks, scale, inverse_temperature, CHUNKS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row_counts(index, mask, ignore_index, row):
        top, total, weighted = merged(sums + row * chunks * 3, chunks, scale, CHUNKS)
        token = tl.load(index + row)
        valid = (token >= 0) & (token < vocabulary)
        line = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
        chosen = tl.load(line + tl.where(valid, token, 0)).to(tl.float32)
        log_sum = tl.log(total)
        logprob = (chosen.to(tl.float64) - top) * inverse_temperature - log_sum
        tl.store(logprobs + row, tl.where(valid, logprob, float("nan")).to(tl.float32))
        tl.store(maxima + row, top)
        tl.store(log_sums + row, log_sum.to(tl.float32))
        if ENTROPY:
            tl.store(entropies + row, (log_sum - weighted * LN_2 / total).to(tl.float32))
    else:
        tl.store(logprobs + row, 0.0)
        tl.store(maxima + row, 0.0)
        tl.store(log_sums + row, 0.0)
        if ENTROPY:
            tl.store(entropies + row, 0.0)


def selective_log_softmax(
    logits: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int | None, temperature: float,
    with_entropy: bool, inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probs, entropies (empty if not asked for), and for the backward maxima and log Σ e^((l − max)/τ)."""
    results = empty_results(index.shape, with_entropy, logits.device)
    reduce_rows(rows_of(logits), Which.of(index, mask, ignore_index), temperature, results)
    return results


Results = tuple[Tensor, Tensor, Tensor, Tensor]


def empty_results(shape: torch.Size, with_entropy: bool, device: torch.device) -> Results:
    """Uninitialised tensors for log-probs, entropies, maxima and log sums."""
    logprobs, maxima, log_sums = (torch.empty(shape, device=device) for _ in range(3))
    return logprobs, torch.empty(shape if with_entropy else 0, device=device), maxima, log_sums


def reduce_rows(logits: Tensor, which: Which, temperature: float, results: Results) -> None:
    """Fills the results from (outer, inner, V) logits. The results have the rows in that order."""
    rows = results[0].numel()
    if rows == 0:
        return
    with_entropy = results[1].numel() > 0
    chunks = sum_chunks(logits, which, rows, temperature, with_entropy=with_entropy)
    _merge[(rows,)](
        logits, *which, chunks.sums, *results, *chunks.layout, chunks.per_row, chunks.scale, 1.0 / temperature,
        CHUNKS=triton.next_power_of_2(chunks.per_row), ENTROPY=with_entropy, num_warps=1,
    )  # fmt: skip


@triton.jit
def gradient_block(
    x, begin, token, top, log_sum, entropy, go, gh, inverse_temperature, BLOCK: tl.constexpr, ENTROPY: tl.constexpr
):
    """d(go·log p_token + gh·H) / d logit from token ``begin`` on: −p·(go + gh·(log p + H))/τ, plus go/τ for the token.

    The token's own entry is computed separately in float64, since 1 − p cancels where p is near 1.
    """
    log2_p = (x - top) * (inverse_temperature * LOG2_E) - log_sum * LOG2_E
    # For a banned token −inf would give 0·inf below. 2^−150 rounds to 0 just as well.
    log2_p = tl.where(log2_p < -150.0, -150.0, log2_p)
    inner = go
    if ENTROPY:
        inner = go + gh * (log2_p * LN_2 + entropy)
    result = -tl.exp2(log2_p) * inner * inverse_temperature
    if (token >= begin) & (token < begin + BLOCK):
        at = begin + tl.arange(0, BLOCK)
        chosen = tl.sum(tl.where(at == token, x, 0.0), 0).to(tl.float64)
        log_p = (chosen - top) * inverse_temperature - log_sum
        p = tl.exp(log_p)
        of_chosen = go * (1.0 - p)
        if ENTROPY:
            of_chosen -= tl.where(p == 0, 0.0, p * gh * (log_p + entropy))
        result = tl.where(at == token, (of_chosen * inverse_temperature).to(tl.float32), result)
    return result


@triton.jit
def _gradient(
    logits, gradient, index, mask, ignore_index, entropies, maxima, log_sums, grad_logprobs, grad_entropies,
    outer_stride, inner_stride, to_outer_stride, to_inner_stride, inner, first, vocabulary, size, inverse_temperature,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """The gradient for a part of a vocabulary of ``size``, whose first token is ``first``."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < vocabulary
    to = gradient + (row // inner) * to_outer_stride + (row % inner) * to_inner_stride + at
    if row_counts(index, mask, ignore_index, row):
        x = tl.load(
            logits + (row // inner) * outer_stride + (row % inner) * inner_stride + at, mask=here, other=float("-inf")
        ).to(tl.float32)
        top = tl.load(maxima + row)
        log_sum = tl.load(log_sums + row)
        token = tl.load(index + row).to(tl.int64)
        # −1: the token is in another part of the vocabulary. Others outside of it have no gradient.
        go = tl.where((token >= -1) & (token < size), tl.load(grad_logprobs + row), 0.0)
        gh = 0.0
        entropy = 0.0
        if ENTROPY:
            gh = tl.load(grad_entropies + row)
            entropy = tl.load(entropies + row)
        begin = tl.program_id(1) * BLOCK
        g = gradient_block(x, begin, token - first, top, log_sum, entropy, go, gh, inverse_temperature, BLOCK, ENTROPY)
        tl.store(to, g.to(gradient.dtype.element_ty), mask=here)
    else:
        tl.store(to, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=here)


def write_gradient(
    logits: Tensor, gradient: Tensor, which: Which, temperature: float, entropies: Tensor, maxima: Tensor,
    log_sums: Tensor, grad_logprobs: Tensor, grad_entropies: Tensor | None, size: int, first: int = 0,
) -> None:  # fmt: skip
    """Writes the gradient of (outer, inner, V) logits, into another tensor or over the logits.

    The logits may be a part of a vocabulary of ``size``, from token ``first`` on.
    """
    rows = grad_logprobs.numel()
    if rows == 0:
        return
    block = blocks(logits.shape[-1], GRADIENT_BLOCK)
    _gradient[(rows, triton.cdiv(logits.shape[-1], block))](
        logits, gradient, *which, entropies, maxima, log_sums, grad_logprobs.contiguous(),
        grad_logprobs if grad_entropies is None else grad_entropies.contiguous(),
        logits.stride(0), logits.stride(1), gradient.stride(0), gradient.stride(1), logits.shape[1], first,
        logits.shape[-1], size, 1.0 / temperature, BLOCK=block, ENTROPY=grad_entropies is not None,
        num_warps=8 if block >= 4096 else 4,
    )  # fmt: skip


def selective_log_softmax_backward(
    logits: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int | None, temperature: float,
    entropies: Tensor, maxima: Tensor, log_sums: Tensor, grad_logprobs: Tensor, grad_entropies: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of the logits, in a new tensor."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    write_gradient(
        rows_of(logits), rows_of(gradient), Which.of(index, mask, ignore_index), temperature, entropies, maxima,
        log_sums, grad_logprobs, grad_entropies, logits.shape[-1],
    )  # fmt: skip
    return gradient


def selective_log_softmax_backward_(
    logits: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int | None, temperature: float,
    entropies: Tensor, maxima: Tensor, log_sums: Tensor, grad_logprobs: Tensor, grad_entropies: Tensor | None,
) -> None:  # fmt: skip
    """Writes the gradient over the logits themselves."""
    rows = rows_of(logits)
    write_gradient(
        rows, rows, Which.of(index, mask, ignore_index), temperature, entropies, maxima, log_sums, grad_logprobs,
        grad_entropies, logits.shape[-1],
    )  # fmt: skip
    if rows.data_ptr() != logits.data_ptr():  # rows_of had to copy, since the strides allow no view
        logits.copy_(rows.view(logits.shape))
