"""The log-prob family on logits = softcap·tanh((hidden · weightᵀ + bias) / softcap)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.reference import log_prob, ppo_loss
from rlhf_kernels.reference.common import common_dtype


def linear_selective_log_softmax_and_entropy(
    hidden: Tensor, weight: Tensor, index: Tensor, wanted: Tensor, bias: Tensor | None, temperature: float,
    softcap: float | None, *, with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probs and, when asked for, entropies of all rows; 0 for those not ``wanted``."""
    logits = _logits(hidden, weight, wanted, bias, softcap)
    return log_prob.selective_log_softmax_and_entropy(
        logits, index, wanted, temperature, False, with_entropy=with_entropy
    )


def linear_ppo_policy_loss(
    hidden: Tensor, weight: Tensor, index: Tensor, old_logprobs: Tensor | None, advantages: Tensor, wanted: Tensor,
    bias: Tensor | None, temperature: float, softcap: float | None, ref_logprobs: Tensor | None, beta: float,
    clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float | None, cispo: bool,
    entropy_coefficient: float, reduction: str, denominator: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The policy loss of the log-probs less the entropy bonus, with the mean entropy among its statistics."""
    logprobs, entropy = linear_selective_log_softmax_and_entropy(
        hidden, weight, index, wanted, bias, temperature, softcap, with_entropy=True
    )
    old_logprobs = logprobs if old_logprobs is None else old_logprobs
    loss, stats = ppo_loss.ppo_policy_loss(
        logprobs, old_logprobs, advantages, wanted, ref_logprobs, beta, clip_low, clip_high, dual_clip, log_ratio_clamp,
        cispo, False, reduction, denominator,
    )  # fmt: skip
    assert entropy is not None
    if entropy_coefficient:
        loss = loss - entropy_coefficient * ppo_loss.reduced(entropy, wanted, reduction, denominator)
    return loss, stats | {"entropy": ppo_loss.masked_mean(entropy.detach(), wanted)}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, wanted: Tensor, bias: Tensor | None, temperature: float,
    softcap: float | None, reduction: str,
) -> Tensor:  # fmt: skip
    """−Σ log p(label) over the rows that count, or the mean."""
    logprobs, _ = linear_selective_log_softmax_and_entropy(
        hidden, weight, labels, wanted, bias, temperature, softcap, with_entropy=False
    )
    loss = -logprobs.sum()
    return loss / wanted.sum().clamp(min=1) if reduction == "mean" else loss


def _logits(hidden: Tensor, weight: Tensor, wanted: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    # Rows that do not count are zeroed before the matmul, so that no NaN of theirs reaches the weight's gradient.
    dtype = common_dtype(hidden, weight, bias)
    hidden = torch.where(wanted[..., None], hidden.to(dtype), 0.0)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
