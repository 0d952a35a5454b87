"""Log-probabilities and losses from hidden states and the output projection, without the (N, V) logits.

logits = hidden · weightᵀ + bias, then softcap·tanh(logits/softcap) when there is a softcap (Gemma 2,
arXiv 2408.00118, section 2), then division by the temperature. On the CPU, numbers below the smallest normal one
(1.2e-38), probabilities and gradients among them, count as 0: processors take a hundred times as long over them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import choose
from rlhf_kernels.log_prob import check_rows, read_rows
from rlhf_kernels.ops import OPS
from rlhf_kernels.ppo_loss import check_reduction, check_reference, check_surrogate, policy_statistics, spread
from rlhf_kernels.reference import linear_log_prob as reference
from rlhf_kernels.registration import autograd, call, fake, needs_gradient, run_kernel, scaled

OPERANDS = ("hidden", "weight", "bias")


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    group: Any = None,
) -> Tensor:
    """:func:`~rlhf_kernels.selective_log_softmax` of ``hidden @ weight.T + bias``.

    Differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: (..., D) float32, bfloat16, float16 (or float64): the states that predict the tokens.
        weight: (V, D), one of these dtypes too: the output embeddings; or, with ``group``, a DTensor of them that
            is split over the vocabulary, evenly or not. Where operands differ in dtype, all are brought
            to float32 first (to float64, if one of them is). Under ``torch.autocast`` all are brought to its dtype, as
            for ``F.linear``; logits, sums and results stay float32.
        index: (...) int64 or int32, in [0, V) where the row counts.
        bias: (V,), likewise.
        temperature: τ > 0.
        softcap: > 0, or None.
        mask: (...) bool or {0, 1}; rows of 0 are dropped before the matmul, give 0 and zero gradient. None: every
            row counts.
        ignore_index: rows with this index are treated as masked.
        group: as for :func:`~rlhf_kernels.selective_log_softmax`. ``weight`` is then (V/processes, D), and so is
            ``bias``; ``hidden`` and ``index`` are the same in all, and the gradient of ``hidden`` is summed over them.

    Returns:
        (...) float32 (float64 for float64 inputs) log-probabilities, in nats.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype not listed above.
        ValueError: shapes or devices differ, an option is out of range, or (looked at on the CPU only) a mask holds
            something besides 0 and 1.
        IndexError: an index out of range (on the CPU; on a GPU its row gives NaN).
        RuntimeError: ``group`` with float64, or on a backend without kernels.
    """
    return _run(hidden, weight, index, mask, ignore_index, bias, temperature, softcap, group, with_entropy=False)[0]


def linear_selective_log_softmax_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """:func:`linear_selective_log_softmax`, and the entropy of each row from the same pass.

    Differentiable in both outputs. Arguments and errors are those of :func:`linear_selective_log_softmax`.

    Returns:
        Two (...) float32 (float64 for float64 inputs) tensors: log-probabilities and entropies, in nats.
    """
    return _run(hidden, weight, index, mask, ignore_index, bias, temperature, softcap, group, with_entropy=True)[:2]


def linear_selective_log_softmax_and_rank(
    hidden: Tensor, weight: Tensor, index: Tensor, *, bias: Tensor | None, temperature: float, softcap: float | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """For integrations: log-probs, entropies (if asked for), and whether each token is a likeliest one.

    The kernels return log Σ e^((l − max)/τ) as well, which the log-prob of a likeliest token is the negative of. (One
    that is a float32 rounding less likely passes for one too.) The reference does not: its last result is None.
    """
    ignore_index = -100
    logprobs, entropies, log_sums = _run(
        hidden, weight, index, None, ignore_index, bias, temperature, softcap, None, with_entropy=with_entropy
    )
    is_likeliest = None if log_sums is None else (logprobs == -log_sums) & (index != ignore_index)
    return logprobs, entropies if with_entropy else None, is_likeliest


def linear_ppo_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    surrogate: str = "clipped",
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    entropy_coefficient: float = 0.0,
    reduction: str = "token-mean",
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`~rlhf_kernels.ppo_policy_loss` of the log-probs of :func:`linear_selective_log_softmax`.

    A row's loss is known as soon as its logits are, so the kernels turn the logits into their gradient at once. That
    takes three matmuls in all, and never more logits than a fixed workspace holds. (One ratio for a sequence needs all
    of its log-probs first: ``ppo_policy_loss(linear_selective_log_softmax(…), …, ratio_level="sequence")``.)

    Differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: (..., D), as for :func:`linear_selective_log_softmax`.
        weight: (V, D).
        index: (...) int64 or int32: the sampled tokens, in [0, V) where ``mask`` is not 0.
        old_logprobs: (...) floating point: log-probs under the policy that sampled the tokens. None: under this one.
        advantages: (...) floating point; or (B,) for hidden of (B, T, D).
        mask: (...) bool or {0, 1}: which positions are response tokens. None: all of them.
        bias: (V,).
        temperature: τ > 0, the one the tokens were sampled at.
        softcap: > 0, or None.
        surrogate: as for :func:`~rlhf_kernels.ppo_policy_loss`.
        clip_range: likewise.
        clip_range_high: likewise.
        dual_clip: likewise.
        log_ratio_clamp: likewise.
        ref_logprobs: (...), likewise.
        beta: likewise.
        entropy_coefficient: c; c·H of every position is taken off its loss, and differentiated, where H is the entropy
            in nats: a bonus (Schulman et al. 2017, equation 9).
        reduction: likewise.
        denominator: likewise.

    Returns:
        The scalar loss, and the statistics of :func:`~rlhf_kernels.ppo_policy_loss` with ``entropy``, the mean
        entropy of the unmasked rows in nats. Statistics carry no gradient.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype not listed above.
        ValueError: shapes or devices differ, an option is out of range or does not fit another, or (looked at on the
            CPU only) a mask holds something besides 0 and 1.
        IndexError: an index out of range (on the CPU; on a GPU the loss is NaN).
    """
    hidden, weight, bias, temperature, softcap = _check_linear(hidden, weight, bias, temperature, softcap)
    rows = hidden.shape[:-1]
    advantages = spread("advantages", advantages, rows)
    for name, value in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        if value is not None:
            checks.tensor(name, value, checks.FLOATS, hidden)
            checks.shape(name, value, rows, "one entry per row of hidden")
    checks.mask("mask", mask, hidden, rows)
    checks.tensor("index", index, checks.INDICES, hidden)
    checks.shape("index", index, rows, "one entry per row of hidden")
    options = (
        *check_reference(ref_logprobs, beta, hidden, rows),
        *check_surrogate(surrogate, clip_range, clip_range_high, dual_clip, log_ratio_clamp),
        checks.number("entropy_coefficient", entropy_coefficient, -math.inf),
        *check_reduction(reduction, denominator, len(rows)),
    )
    backend = choose("linear_ppo_policy_loss", hidden, weight, bias)
    mask = checks.read_mask(backend, "mask", mask, index)
    index = checks.read_index(backend, "index", index, mask, weight.shape[0])
    if backend == "reference":
        assert mask is not None
        return reference.linear_ppo_policy_loss(
            hidden, weight, index, old_logprobs, advantages, mask, bias, temperature, softcap, *options
        )
    hidden, weight, bias = _operands(hidden, weight, bias)
    loss, statistics, *_ = call(
        backend, "linear_ppo_policy_loss", hidden, weight, index, old_logprobs, advantages, mask, bias, temperature,
        softcap, *options, needs_gradient(hidden), needs_gradient(weight, bias),
    )  # fmt: skip
    *values, entropy = statistics.unbind()
    return loss, policy_statistics(tuple(values), dual_clip, ref_logprobs) | {"entropy": entropy}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``labels`` under the logits of ``hidden @ weight.T + bias``, without holding them.

    The loss of supervised fine-tuning and of the pretraining mix (Ouyang et al. 2022, equation 2). Three matmuls, as
    for :func:`linear_ppo_policy_loss`. Differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: (..., D), as for :func:`linear_selective_log_softmax`.
        weight: (V, D).
        labels: (...) int64 or int32, in [0, V) or ``ignore_index``.
        bias: (V,).
        temperature: τ > 0.
        softcap: > 0, or None.
        ignore_index: rows with this label are left out, of the mean too.
        reduction: "mean" over the rows that count, or "sum".

    Returns:
        The scalar loss in nats; 0, with zero gradient, when no row counts.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype not listed above.
        ValueError: shapes or devices differ, or an option is out of range.
        IndexError: a label out of range (on the CPU; on a GPU the loss is NaN).
    """
    hidden, weight, bias, temperature, softcap = _check_linear(hidden, weight, bias, temperature, softcap)
    checks.choice("reduction", reduction, ("mean", "sum"))
    checks.tensor("labels", labels, checks.INDICES, hidden)
    checks.shape("labels", labels, hidden.shape[:-1], "one entry per row of hidden")
    ignore_index = checks.ignore_index(ignore_index, labels)
    backend = choose("linear_cross_entropy", hidden, weight, bias)
    labels = checks.read_index(backend, "labels", labels, None, weight.shape[0], ignore_index)
    if backend == "reference":
        wanted = checks.counted(labels, None, ignore_index)
        return reference.linear_cross_entropy(hidden, weight, labels, wanted, bias, temperature, softcap, reduction)
    hidden, weight, bias = _operands(hidden, weight, bias)
    return call(
        backend, "linear_cross_entropy", hidden, weight, labels, ignore_index, bias, temperature, softcap,
        reduction == "mean", needs_gradient(hidden), needs_gradient(weight, bias),
    )[0]  # fmt: skip


def _check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None, float, float | None]:
    """The arguments as they are taken, the operands in autocast's dtype where it is on (it leaves float64 alone)."""
    checks.tensor("hidden", hidden, checks.FLOATS)
    if hidden.dim() == 0:
        raise ValueError("hidden: has shape (), must be (..., D)")
    checks.tensor("weight", weight, checks.FLOATS, hidden)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: has shape {tuple(weight.shape)}, must be (V, D) with V at least 1")
    checks.shape("weight", weight, (weight.shape[0], hidden.shape[-1]), "with the width of hidden")
    if bias is not None:
        checks.tensor("bias", bias, checks.FLOATS, hidden)
        checks.shape("bias", bias, (weight.shape[0],), "one entry per row of weight")
    temperature = checks.temperature(temperature)
    if softcap is not None:
        softcap = checks.number("softcap", softcap, 0.0, exclusive_low=True)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden, weight, bias, temperature, softcap


def _run(
    hidden: Tensor, weight: Any, index: Tensor, mask: Tensor | None, ignore_index: int, bias: Any,
    temperature: float, softcap: float | None, group: Any, *, with_entropy: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Log-probs, entropies and log Σ e^((l − max)/τ), which the kernels alone give, and for a whole vocabulary."""
    part = None
    if group is not None:
        from rlhf_kernels import vocabulary_parallel

        if type(weight).__name__ == "DTensor":
            part, weight, bias = vocabulary_parallel.part_of_dtensor(group, weight, bias)
    hidden, weight, bias, temperature, softcap = _check_linear(hidden, weight, bias, temperature, softcap)
    ignore_index = check_rows(index, hidden, hidden.shape[:-1], mask, ignore_index)
    backend = choose("linear_selective_log_softmax", hidden, weight, bias)
    if group is not None:
        hidden, weight, bias = _operands(hidden, weight, bias)
        results = vocabulary_parallel.linear_log_probs(
            hidden, weight, index, mask, ignore_index, bias, group, part, backend, temperature, softcap,
            with_entropy=with_entropy,
        )  # fmt: skip
        return *results, None
    index, mask = read_rows(backend, index, mask, ignore_index, weight.shape[0])
    if backend == "reference":
        wanted = checks.counted(index, mask, ignore_index)
        results = reference.linear_selective_log_softmax_and_entropy(
            hidden, weight, index, wanted, bias, temperature, softcap, with_entropy=with_entropy
        )
        return *results, None
    hidden, weight, bias = _operands(hidden, weight, bias)
    logprobs, entropies, _, log_sums = call(
        backend, "linear_selective_log_softmax", hidden, weight, index, mask, ignore_index, bias, temperature, softcap,
        with_entropy,
    )  # fmt: skip
    entropies = entropies.view(index.shape) if with_entropy else entropies
    return logprobs.view(index.shape), entropies, log_sums.view(index.shape)


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The hidden states as (N, D), and all operands in one dtype."""
    hidden = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None]
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if len(dtypes) > 1:
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    return hidden, weight, bias


def _gradients_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_hidden: bool, needs_weight: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    def like(operand: Tensor | None, needed: bool) -> Tensor:
        if operand is not None and needed:
            return operand.new_empty(operand.shape, dtype=dtype)
        return hidden.new_empty(0, dtype=torch.float32)

    return like(hidden, needs_hidden), like(weight, needs_weight), like(bias, needs_weight)


def _kept(operands: torch.dtype) -> torch.dtype:
    """What a loss keeps its gradients in until the one that comes in is known.

    That may be a loss scale, to which float16 would have lost everything below 6e-8.
    """
    return torch.float32 if operands == torch.float16 else operands


@fake("linear_selective_log_softmax")
def _(
    hidden: Tensor, weight: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int | None,
    bias: Tensor | None, temperature: float, softcap: float | None, with_entropy: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    def per_row(count: int) -> Tensor:
        return hidden.new_empty(count, dtype=torch.float32)

    rows = index.numel()
    return per_row(rows), per_row(rows if with_entropy else 0), per_row(rows), per_row(rows)


@fake("linear_selective_log_softmax_backward")
def _(
    hidden: Tensor, weight: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int | None,
    bias: Tensor | None, temperature: float, softcap: float | None, entropies: Tensor, maxima: Tensor,
    log_sums: Tensor, grad_logprobs: Tensor, grad_entropies: Tensor | None, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _gradients_like(hidden, weight, bias, needs_hidden, needs_weight, hidden.dtype)


@fake("linear_ppo_policy_loss")
def _(
    hidden: Tensor, weight: Tensor, index: Tensor, old_logprobs: Tensor | None, advantages: Tensor,
    mask: Tensor | None, bias: Tensor | None, temperature: float, softcap: float | None, ref_logprobs: Tensor | None,
    beta: float,
    clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float | None, cispo: bool,
    entropy_coefficient: float, reduction: str, denominator: float | None, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss = hidden.new_empty((), dtype=torch.float32)
    statistics = loss.new_empty(len(OPS["linear_ppo_policy_loss"].statistics))
    return loss, statistics, *_gradients_like(hidden, weight, bias, needs_hidden, needs_weight, _kept(hidden.dtype))


@fake("linear_cross_entropy")
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, bias: Tensor | None, temperature: float,
    softcap: float | None, mean: bool, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, *_gradients_like(hidden, weight, bias, needs_hidden, needs_weight, _kept(hidden.dtype))


def _save_rows(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.temperature, ctx.softcap, ctx.with_entropy = inputs.temperature, inputs.softcap, inputs.with_entropy
    ctx.ignore_index, ctx.needs_hidden = inputs.ignore_index, inputs.hidden.requires_grad
    ctx.needs_weight = inputs.weight.requires_grad or (inputs.bias is not None and inputs.bias.requires_grad)
    _, entropies, maxima, log_sums = output
    ctx.save_for_backward(
        inputs.hidden, inputs.weight, inputs.index, inputs.mask, inputs.bias, entropies, maxima, log_sums
    )
    ctx.mark_non_differentiable(maxima, log_sums, *(() if ctx.with_entropy else (entropies,)))
    ctx.set_materialize_grads(False)


@autograd("linear_selective_log_softmax", _save_rows, variables=OPERANDS)
def _backward_of_rows(
    ctx: Any, saved: tuple[Any, ...], grad_logprobs: Tensor | None, grad_entropies: Tensor | None, *_: Any
) -> dict[str, Tensor | None]:
    hidden, weight, index, mask, bias, entropies, maxima, log_sums = saved
    if grad_logprobs is None:
        if grad_entropies is None:
            return {}
        grad_logprobs = torch.zeros_like(maxima)
    of_hidden, of_weight, of_bias = run_kernel(
        ctx.backend, "linear_selective_log_softmax_backward",
        hidden, weight, index, mask, ctx.ignore_index, bias, ctx.temperature, ctx.softcap, entropies, maxima, log_sums,
        grad_logprobs, grad_entropies, ctx.needs_hidden, ctx.needs_weight,
    )  # fmt: skip
    return {
        "hidden": of_hidden if ctx.needs_hidden else None,
        "weight": of_weight if ctx.needs_weight else None,
        "bias": of_bias if ctx.needs_weight and bias is not None else None,
    }


# The ops of the losses return the gradients too, and the derivative only scales them.


def _save_loss(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    _, *statistics, of_hidden, of_weight, of_bias = output
    ctx.save_for_backward(inputs.hidden, inputs.weight, inputs.bias, of_hidden, of_weight, of_bias)
    ctx.mark_non_differentiable(*statistics, of_hidden, of_weight, of_bias)
    # The gradient is an output of this op. Autograd must not make zeros of its size as that output's own gradient.
    ctx.set_materialize_grads(False)
    ctx.needs_hidden, ctx.needs_weight = inputs.needs_hidden, inputs.needs_weight


def _backward_of_loss(ctx: Any, saved: tuple[Any, ...], grad_loss: Tensor, *_: Any) -> dict[str, Tensor | None]:
    hidden, weight, bias, of_hidden, of_weight, of_bias = saved

    def arriving(gradient: Tensor, operand: Tensor | None, needed: bool) -> Tensor | None:
        return scaled(gradient, grad_loss, operand.dtype) if needed and operand is not None else None

    return {
        "hidden": arriving(of_hidden, hidden, ctx.needs_hidden),
        "weight": arriving(of_weight, weight, ctx.needs_weight),
        "bias": arriving(of_bias, bias, ctx.needs_weight),
    }


autograd("linear_ppo_policy_loss", _save_loss, variables=OPERANDS)(_backward_of_loss)
autograd("linear_cross_entropy", _save_loss, variables=OPERANDS)(_backward_of_loss)
