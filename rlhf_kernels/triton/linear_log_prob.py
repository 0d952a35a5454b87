"""Log-probs from hidden states without all logits in memory, and losses that turn a chunk of logits into its gradient.

All matmuls are the vendor's. They sum in float32, whatever the operands' dtype.

Log-probs are computed for a fixed number of rows at a time, and the last rows are padded to that number. A matmul of
one shape always sums in the same way, so a row has the same bits whichever rows are beside it. Their backward already
knows the sums of each row. It computes the logits again in blocks of the vocabulary, so that every entry of the
weight's gradient is a single sum in float32 over all rows. The losses go by rows in both directions, since a row's
gradient can be computed only when all of its logits are known.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.checks import counted
from rlhf_kernels.ops import OPS
from rlhf_kernels.triton.common import LN_2, LOG2_E, blocks, places
from rlhf_kernels.triton.log_prob import Which, empty_results, gradient_block, reduce_block, reduce_rows, write_gradient
from rlhf_kernels.triton.ppo_loss import (
    APPROX_KL,
    CLIP_FRACTION,
    DUAL_CLIP_FRACTION,
    LOG_RATIO_MEAN,
    RATIO_MAX_DEVIATION,
    RATIO_MEAN,
    REF_KL,
    policy_options,
    policy_results,
    policy_term,
    reference_term,
    row_weights,
)

# How many rows a matmul of the log-probs has. The bits of the results depend on it, so it is never tuned.
ROWS = 512
# How many floats the kernel of the losses stores per row: one for each statistic of the policy loss.
STATISTICS = tl.constexpr(len(OPS["linear_ppo_policy_loss"].statistics))
(ENTROPY,) = places("linear_ppo_policy_loss", "entropy")
# The memory that the losses plan for the float32 logits of some rows, over which their gradient is written. With a
# vocabulary of 128 000 this is a thousand rows, enough for a matmul to be bound by arithmetic and not by memory.
LOSS_BYTES = 512 << 20
# The memory that the backward of the log-probs plans: for float32 logits of some tokens, for their gradient in half
# precision and for the sums of hidden's gradient.
BACKWARD_BYTES = 256 << 20
# Chunks are a multiple of this, so that the tiles of a matmul divide them.
TILE = 128


def rows_at_a_time(count: int, vocabulary: int) -> int:
    """How many rows the losses work on together: about equally many each time, so that no small rest is left."""
    most = max(TILE, LOSS_BYTES // (4 * vocabulary) // TILE * TILE)
    each = triton.cdiv(count, max(1, triton.cdiv(count, most)))
    return min(most, triton.cdiv(each, TILE) * TILE)


def tokens_at_a_time(count: int, depth: int) -> int:
    """How many tokens of the vocabulary the backward of the log-probs works on together, for so many rows."""
    return max(TILE, (BACKWARD_BYTES - 4 * count * depth) // (6 * max(1, count)) // TILE * TILE)


def may_wait(tensor: Tensor) -> bool:
    """Whether the host may wait for a value of the GPU. It may not while a CUDA graph is captured."""
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


class Rows:
    """The rows that count, gathered into one tensor, and the operands as the kernels read them.

    The number of rows that count is known only after waiting for the GPU, once a call. That takes microseconds, and
    multiplying rows that don't count milliseconds. Where waiting is not allowed, all rows are kept. Those that don't
    count are then set to 0, and add nothing to any result. With neither a mask nor ``ignore_index`` nobody waits.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int | None,
        bias: Tensor | None, temperature: float, softcap: float | None,
    ):  # fmt: skip
        self.count = hidden.shape[0]
        self.wanted = counted(index, mask, ignore_index).reshape(-1)
        self.all = mask is None and ignore_index is None
        if self.all:
            self.hidden = hidden.contiguous()
        elif may_wait(hidden):
            self.kept = self.wanted.nonzero().squeeze(1)
            self.all = self.kept.numel() == self.count
            self.hidden = (hidden if self.all else hidden[self.kept]).contiguous()
            self.wanted = self.take(self.wanted)
        else:
            self.all = True
            self.hidden = torch.where(self.wanted[:, None], hidden, 0)
        self.weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        self.index = self.take(index)
        self.bias = None if bias is None else bias.contiguous()
        self.temperature, self.softcap = temperature, softcap

    def share(self) -> Tensor:
        """One over the number of rows that count, float64."""
        return self.wanted.sum().clamp(min=1).double().reciprocal()

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def which(self, part: slice) -> Which:
        """What says which of some rows count, and their tokens."""
        return Which(self.index[part], self.wanted[part], None)

    def take(self, per_row: Tensor) -> Tensor:
        """The entries of the rows that count."""
        flat = per_row.reshape(-1)
        return (flat if self.all else flat[self.kept]).contiguous()

    def scatter(self, per_row: Tensor) -> Tensor:
        """Puts values of the rows that count back among all rows, with 0 for the others."""
        if self.all:
            return per_row
        result = per_row.new_zeros(self.count, *per_row.shape[1:])
        result[self.kept] = per_row
        return result

    def logits(self, hidden: Tensor, tokens: slice, out: Tensor | None = None) -> Tensor:
        """float32 logits of some rows and tokens, with bias and softcap applied."""
        if out is None:
            product = matmul(hidden, self.weight[tokens].t())
        else:
            accumulate(product := out, hidden, self.weight[tokens].t(), is_first=True)
        if self.bias is not None:
            product += self.bias[tokens]
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a·b in float32 from operands of any dtype. Products of half-precision numbers are exact in float32."""
    if a.device.type != "cuda":  # in the interpreter: float64, so that the bits are the same on any number of threads
        return (a.double() @ b.double()).float()
    with torch.autocast("cuda", enabled=False):
        return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """Adds a·b to the total, or starts it. Products are summed in float32 and rounded once, to the total's dtype."""
    if total.device.type != "cuda":
        product = matmul(a, b)
        total.copy_(product if is_first else total + product)
        return
    beta = 0 if is_first else 1
    with torch.autocast("cuda", enabled=False):
        if total.dtype == a.dtype:
            torch.addmm(total, a, b, beta=beta, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)


def linear_selective_log_softmax(
    hidden: Tensor, weight: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int | None,
    bias: Tensor | None, temperature: float, softcap: float | None, with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probs, entropies (empty if not asked for), maxima and log Σ e^((l − max)/τ), without all logits in memory."""
    rows = Rows(hidden, weight, index, mask, ignore_index, bias, temperature, softcap)
    count = len(rows)
    logprobs, entropies, maxima, log_sums = empty_results(torch.Size([count]), with_entropy, hidden.device)
    block = hidden.new_zeros(ROWS, hidden.shape[1])
    for first in range(0, count, ROWS):
        part = slice(first, min(count, first + ROWS))
        size = part.stop - first
        block[:size] = rows.hidden[part]  # a copy, always at the same alignment: a matmul's order may depend on it
        logits = rows.logits(block, slice(None))[:size]
        some = (logprobs[part], entropies[part], maxima[part], log_sums[part])
        reduce_rows(logits[None], rows.which(part), temperature, some)
    entropies = rows.scatter(entropies) if with_entropy else entropies
    return rows.scatter(logprobs), entropies, rows.scatter(maxima), rows.scatter(log_sums)


def linear_selective_log_softmax_backward(
    hidden: Tensor, weight: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int | None,
    bias: Tensor | None, temperature: float, softcap: float | None, entropies: Tensor, maxima: Tensor,
    log_sums: Tensor, grad_logprobs: Tensor, grad_entropies: Tensor | None, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of hidden, weight and bias; empty where not needed."""
    rows = Rows(hidden, weight, index, mask, ignore_index, bias, temperature, softcap)
    count, vocabulary = len(rows), weight.shape[0]
    maxima, log_sums, grad_logprobs = (rows.take(x) for x in (maxima, log_sums, grad_logprobs))
    entropies = rows.take(entropies) if grad_entropies is not None else entropies
    grad_entropies = None if grad_entropies is None else rows.take(grad_entropies)
    gradients = Gradients(rows, needs_hidden, needs_weight, by_rows=False)
    tokens = min(vocabulary, tokens_at_a_time(count, hidden.shape[1]))
    # Written in the operands' dtype at once, the only one that the next matmuls take.
    buffer = hidden.new_empty(count * tokens, dtype=torch.float32)
    halves = None if hidden.dtype == torch.float32 else torch.empty_like(buffer, dtype=hidden.dtype)
    for first in range(0, vocabulary if count else 0, tokens):
        part = slice(first, min(vocabulary, first + tokens))
        width = part.stop - first
        logits = rows.logits(rows.hidden, part, buffer[: count * width].view(count, width))
        slopes = logits if halves is None else halves[: count * width].view(count, width)
        kept = logits.clone() if softcap is not None and slopes is logits else logits
        write_gradient(
            kept[None], slopes[None], rows.which(slice(None)), temperature, entropies, maxima, log_sums, grad_logprobs,
            grad_entropies, vocabulary, first,
        )  # fmt: skip
        if softcap is not None:
            slopes *= 1 - (kept / softcap).square()
        gradients.add(slopes, slice(None), part)
    return gradients.results()


class Gradients:
    """The gradients of hidden, weight and bias, from the logits' gradient for parts of the rows and tokens.

    A row of hidden's is one sum where parts have the whole vocabulary (``by_rows``), else it is summed in float32. With
    ``boost`` all are kept in float32, and what comes is taken to be that many times too large.
    """

    def __init__(
        self, rows: Rows, needs_hidden: bool, needs_weight: bool, *, by_rows: bool, boost: Tensor | None = None
    ):
        self.rows, self.boost = rows, boost
        like = rows.hidden
        new = like.new_empty if len(rows) else like.new_zeros
        self.hidden = new(like.shape, dtype=self.dtype if by_rows else torch.float32) if needs_hidden else None
        # In the weight's own dtype. When parts go by vocabulary, each entry is one sum, rounded once. When they go by
        # rows, each part is added to the rounded sum of the parts before it. With eight of them that makes the error a
        # third larger than the rounding of the logits' gradient does.
        self.weight = new(rows.weight.shape, dtype=self.dtype) if needs_weight else None
        self.bias = (
            like.new_zeros(rows.weight.shape[0], dtype=torch.float32)
            if needs_weight and rows.bias is not None
            else None
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""
        return self.rows.hidden.dtype if self.boost is None else torch.float32

    def add(self, slopes: Tensor, rows: slice, tokens: slice) -> None:
        """Adds what these rows and tokens contribute, given their logits' gradient. Parts must come in order."""
        if self.hidden is not None:
            accumulate(self.hidden[rows], slopes, self.rows.weight[tokens], is_first=not tokens.start)
        if self.weight is not None:
            accumulate(self.weight[tokens], slopes.t(), self.rows.hidden[rows], is_first=not rows.start)
        if self.bias is not None:
            self.bias[tokens] += slopes.sum(0, dtype=torch.float32)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients; empty where not needed."""
        rows, nothing = self.rows, self.rows.hidden.new_empty(0, dtype=torch.float32)
        if self.boost is not None:
            for gradient in (self.hidden, self.weight, self.bias):
                if gradient is not None:
                    gradient /= self.boost
        hidden = nothing if self.hidden is None else rows.scatter(self.hidden.to(self.dtype))
        weight = nothing if self.weight is None else self.weight
        bias = nothing if self.bias is None else self.bias.to(self.dtype)
        return hidden, weight, bias


@triton.jit
def _row_losses(
    logits, slopes, index, wanted, weights, advantages, old_logprobs, ref_logprobs, losses, statistics, stride,
    slope_stride, vocabulary, scale, inverse_temperature, softcap, low, low_lost, high, high_lost, dual, least,
    largest, beta, beta_lost, entropy_coefficient, BLOCK: tl.constexpr, POLICY: tl.constexpr, DUAL: tl.constexpr,
    CISPO: tl.constexpr, OLD: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY_BONUS: tl.constexpr,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """A row's loss from its logits, then the gradient of those, which is written over them, maybe in half precision.

    The logits are read twice.
    """
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    top = float("-inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(line + at, mask=at < vocabulary, other=float("-inf"))
        top, total, weighted = reduce_block(x, top, total, weighted, scale, POLICY)
    token = tl.load(index + row)
    valid = (token >= 0) & (token < vocabulary)
    counts = tl.load(wanted + row) != 0
    weight = tl.where(counts, tl.load(weights + row), 0.0)
    log_sum = tl.log(total.to(tl.float64))
    chosen = tl.load(line + tl.where(valid, token, 0))
    logprob = (chosen.to(tl.float64) - top) * inverse_temperature - log_sum
    logprob = tl.where(valid, logprob, tl.where(counts, float("nan"), 0.0))
    coefficient = (-weight).to(tl.float32)
    loss = -logprob
    entropy = 0.0
    of_entropy = 0.0
    if POLICY:
        exact = logprob - logprob  # NaN where the log-prob is not finite
        if OLD:
            exact = logprob - tl.load(old_logprobs + row).to(tl.float64)
        loss, slope, ratio, kl, clipped, limited = policy_term(
            logprob, exact, tl.load(advantages + row), low, low_lost, high, high_lost, dual, least, largest, DUAL, CISPO
        )
        to = statistics + row * STATISTICS
        ref_kl = 0.0
        if REFERENCE:
            ref_loss, ref_slope, ref_kl = reference_term(logprob, tl.load(ref_logprobs + row), beta, beta_lost)
            loss += ref_loss
            slope += ref_slope
        coefficient = (slope * weight).to(tl.float32)
        entropy = (log_sum - weighted.to(tl.float64) * LN_2 / total).to(tl.float32)
        if ENTROPY_BONUS:
            loss -= tl.cast(entropy_coefficient, tl.float64) * entropy
            of_entropy = (-entropy_coefficient * weight).to(tl.float32)
        tl.store(to + REF_KL, tl.where(counts, ref_kl, 0.0))
        tl.store(to + RATIO_MEAN, tl.where(counts, ratio, 0.0))
        tl.store(to + LOG_RATIO_MEAN, tl.where(counts, exact, 0.0).to(tl.float32))
        tl.store(to + RATIO_MAX_DEVIATION, tl.where(counts, tl.abs(ratio - 1.0), 0.0))
        tl.store(to + APPROX_KL, tl.where(counts, kl, 0.0))
        tl.store(to + CLIP_FRACTION, tl.where(counts, clipped, 0.0))
        tl.store(to + DUAL_CLIP_FRACTION, tl.where(counts, limited, 0.0))
        tl.store(to + ENTROPY, tl.where(counts, tl.where(valid, entropy, float("nan")), 0.0))
    tl.store(losses + row, tl.where(counts, loss * weight, 0.0))
    if GRADIENT:
        coefficient = tl.where(valid & counts, coefficient, 0.0)
        of_entropy = tl.where(valid & counts, of_entropy, 0.0)
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            here = at < vocabulary
            x = tl.load(line + at, mask=here, other=float("-inf"))
            g = gradient_block(
                x, start, token, top, log_sum.to(tl.float32), entropy, coefficient, of_entropy, inverse_temperature,
                BLOCK, ENTROPY_BONUS,
            )  # fmt: skip
            if SOFTCAP:
                y = x / softcap
                g = g * (1.0 - y * y)
            tl.debug_barrier()  # a narrower gradient lies where other threads have yet to read
            tl.store(slopes + row * slope_stride + at, g.to(slopes.dtype.element_ty), mask=here)


def _losses(
    rows: Rows, weights: Tensor, policy: tuple[Tensor, Tensor | None, Tensor | None] | None, options: dict[str, Any],
    needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The losses and statistics of the rows, and the gradients of the losses' sum, for a chunk of rows at a time."""
    count, vocabulary = len(rows), rows.weight.shape[0]
    device = rows.hidden.device
    losses = torch.empty(count, dtype=torch.float64, device=device)
    statistics = torch.empty(count, STATISTICS.value if policy else 0, device=device)
    advantages, old, reference = policy or (losses, None, None)
    options = options | {"POLICY": policy is not None, "OLD": old is not None, "REFERENCE": reference is not None}
    advantages, old, reference = (losses if x is None else x for x in (advantages, old, reference))
    with_gradient = needs_hidden or needs_weight
    boost = None
    if with_gradient and rows.hidden.dtype == torch.float16:
        slope = torch.where(rows.wanted, advantages.abs().double(), 0.0) if policy else 1.0
        slope = weights * (slope + options["beta"] + abs(options["entropy_coefficient"])) / rows.temperature
        boost = boost_of(slope.max() if count else weights.new_ones(()))
        weights = weights * boost
    gradients = Gradients(rows, needs_hidden, needs_weight, by_rows=True, boost=boost)
    size = min(count, rows_at_a_time(count, vocabulary))
    buffer = rows.hidden.new_empty(size, vocabulary, dtype=torch.float32)
    # With the softcap's terms, larger blocks would spill registers in some versions of Triton.
    block = blocks(vocabulary, 4096 if rows.softcap is None else 2048)
    for first in range(0, count, max(1, size)):
        part = slice(first, min(count, first + size))
        logits = rows.logits(rows.hidden[part], slice(None), buffer[: part.stop - first])
        slopes = logits.view(rows.hidden.dtype)[:, :vocabulary]  # in the operands' dtype, over the logits
        _row_losses[(logits.shape[0],)](
            logits, slopes, rows.index[part], rows.wanted[part], weights[part], advantages[part], old[part],
            reference[part], losses[part], statistics[part], logits.stride(0), slopes.stride(0), vocabulary,
            LOG2_E.value / rows.temperature, 1.0 / rows.temperature, rows.softcap or 1.0, **options,
            BLOCK=block, SOFTCAP=rows.softcap is not None, GRADIENT=with_gradient, num_warps=8,
        )  # fmt: skip
        if with_gradient:
            gradients.add(slopes, part, slice(None))
    return losses if boost is None else losses / boost, statistics, gradients.results()


def boost_of(largest: Tensor) -> Tensor:
    """A power of two, by which the logits' gradients are multiplied while they are float16, from the largest of them.

    With weights of one over thousands of tokens, those of improbable tokens would be 0 in float16, whatever loss scale
    comes later. So the largest is brought to between 32 and 64: a ratio, which is not known yet, can make it a thousand
    times as large.
    """
    return torch.exp2(torch.floor(6 - torch.log2(largest.clamp(1e-30, 1e30))))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, bias: Tensor | None, temperature: float,
    softcap: float | None, mean: bool, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and the gradients of hidden, weight and bias."""
    rows = Rows(hidden, weight, labels, None, ignore_index, bias, temperature, softcap)
    share = rows.share() if mean else torch.ones((), dtype=torch.float64, device=hidden.device)
    weights = share.repeat(len(rows))
    options = policy_options(0.0, 0.0, None, None, False, 0.0) | {"entropy_coefficient": 0.0, "ENTROPY_BONUS": False}
    losses, _, gradients = _losses(rows, weights, None, options, needs_hidden, needs_weight)
    return losses.sum().float(), *gradients


def linear_ppo_policy_loss(
    hidden: Tensor, weight: Tensor, index: Tensor, old_logprobs: Tensor | None, advantages: Tensor,
    mask: Tensor | None, bias: Tensor | None, temperature: float, softcap: float | None, ref_logprobs: Tensor | None,
    beta: float,
    clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float | None, cispo: bool,
    entropy_coefficient: float, reduction: str, denominator: float | None, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, its statistics and the mean entropy, and the gradients of hidden, weight and bias."""
    rows = Rows(hidden, weight, index, mask, None, bias, temperature, softcap)
    weights = rows.take(row_weights(counted(index, mask, None), reduction, denominator))
    old, reference = (None if x is None else rows.take(x).float() for x in (old_logprobs, ref_logprobs))
    options = policy_options(clip_low, clip_high, dual_clip, log_ratio_clamp, cispo, beta)
    options |= {"entropy_coefficient": entropy_coefficient, "ENTROPY_BONUS": entropy_coefficient != 0}
    policy = (rows.take(advantages).float(), old, reference)
    losses, statistics, gradients = _losses(rows, weights, policy, options, needs_hidden, needs_weight)
    loss, values = policy_results(losses, statistics, rows.share())
    return loss, values, *gradients
