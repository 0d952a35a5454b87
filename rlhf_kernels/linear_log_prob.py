"""Log-probabilities and losses from hidden states and the output projection, without the (N, V) logits.

logits = hidden · weightᵀ + bias, then softcap·tanh(logits/softcap) when there is a softcap (Gemma 2,
arXiv 2408.00118, section 2), then division by the temperature.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import dispatch
from rlhf_kernels.log_prob import wanted_rows
from rlhf_kernels.ppo_loss import check_clipping, check_reduction


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    row_mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """:func:`~rlhf_kernels.selective_log_softmax` of ``hidden @ weight.T + bias``.

    Differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: (..., D) float32, bfloat16, float16 (or float64): the states that predict the tokens.
        weight: (V, D), dtype of ``hidden``: the output embeddings.
        index: (...) int64 or int32, in [0, V) where the row counts.
        bias: (V,), dtype of ``hidden``.
        temperature: τ > 0.
        softcap: > 0, or None.
        row_mask: (...) bool or {0, 1}; rows of 0 are dropped before the matmul, give 0 and zero gradient. None: every
            row counts.
        ignore_index: rows with this index are treated as masked.

    Returns:
        (...) float32 (float64 for float64 inputs) log-probabilities, in nats.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype not listed above.
        ValueError: shapes or devices differ, an option is out of range, or (looked at on the CPU only) a mask holds
            something besides 0 and 1.
        IndexError: an index out of range (on the CPU; on a GPU its row gives NaN).
    """
    _check_linear(hidden, weight, bias, temperature, softcap)
    wanted = wanted_rows(index, hidden, hidden.shape[:-1], weight.shape[0], row_mask, ignore_index)
    op = dispatch("linear_log_prob", "linear_selective_log_softmax_and_entropy", hidden.device)
    return op(hidden, weight, index, wanted, bias, temperature, softcap, with_entropy=False)[0]


def linear_selective_log_softmax_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    row_mask: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """:func:`linear_selective_log_softmax`, and the entropy of each row from the same pass.

    Differentiable in both outputs. Arguments and errors are those of :func:`linear_selective_log_softmax`.

    Returns:
        Two (...) float32 (float64 for float64 inputs) tensors: log-probabilities and entropies, in nats.
    """
    _check_linear(hidden, weight, bias, temperature, softcap)
    wanted = wanted_rows(index, hidden, hidden.shape[:-1], weight.shape[0], row_mask, ignore_index)
    op = dispatch("linear_log_prob", "linear_selective_log_softmax_and_entropy", hidden.device)
    return op(hidden, weight, index, wanted, bias, temperature, softcap, with_entropy=True)


def linear_ppo_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    reduction: str = "token-mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`~rlhf_kernels.ppo_policy_loss` of the log-probs of :func:`linear_selective_log_softmax`.

    The loss is known when the logits are, so a backend turns them into their gradient at once: three matmuls in all,
    and never more logits than a fixed workspace holds. Differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: (..., D), as for :func:`linear_selective_log_softmax`.
        weight: (V, D).
        index: (...) int64 or int32: the sampled tokens, in [0, V) where ``mask`` is not 0.
        old_logprobs: (...) floating point: log-probs under the policy that sampled the tokens.
        advantages: (...) floating point.
        mask: (...) bool or {0, 1}: which positions are response tokens. None: all of them.
        bias: (V,).
        temperature: τ > 0, the one the tokens were sampled at.
        softcap: > 0, or None.
        clip_range: as for :func:`~rlhf_kernels.ppo_policy_loss`.
        clip_range_high: likewise.
        dual_clip: likewise.
        reduction: likewise; only "token-mean" for 1-D rows.

    Returns:
        The scalar loss, and the statistics of :func:`~rlhf_kernels.ppo_policy_loss` with ``entropy``, the mean
        entropy of the unmasked rows in nats. Statistics carry no gradient.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype not listed above.
        ValueError: shapes or devices differ, an option is out of range, or (looked at on the CPU only) a mask holds
            something besides 0 and 1.
        IndexError: an index out of range (on the CPU; on a GPU the loss is NaN).
    """
    _check_linear(hidden, weight, bias, temperature, softcap)
    rows = hidden.shape[:-1]
    for name, value in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        checks.tensor(name, value, checks.FLOATS, hidden)
        checks.shape(name, value, rows, "one entry per row of hidden")
    wanted = checks.mask("mask", mask, hidden, rows)
    checks.tensor("index", index, checks.INDICES, hidden)
    checks.shape("index", index, rows, "one entry per row of hidden")
    checks.index_range("index", index, weight.shape[0], wanted)
    check_clipping(clip_range, clip_range_high, dual_clip)
    check_reduction(reduction, len(rows))
    op = dispatch("linear_log_prob", "linear_ppo_policy_loss", hidden.device)
    return op(
        hidden, weight, index, old_logprobs, advantages, wanted, bias, temperature, softcap,
        clip_range, clip_range if clip_range_high is None else clip_range_high, dual_clip, reduction,
    )  # fmt: skip


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
    _check_linear(hidden, weight, bias, temperature, softcap)
    checks.choice("reduction", reduction, ("mean", "sum"))
    checks.tensor("labels", labels, checks.INDICES, hidden)
    checks.shape("labels", labels, hidden.shape[:-1], "one entry per row of hidden")
    checks.integer("ignore_index", ignore_index)
    wanted = labels != ignore_index
    checks.index_range("labels", labels, weight.shape[0], wanted)
    op = dispatch("linear_log_prob", "linear_cross_entropy", hidden.device)
    return op(hidden, weight, labels, wanted, bias, temperature, softcap, reduction)


def _check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
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
    checks.number("temperature", temperature, 0.0, exclusive_low=True)
    if softcap is not None:
        checks.number("softcap", softcap, 0.0, exclusive_low=True)
