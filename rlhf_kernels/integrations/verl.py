"""Our ops inside verl: ``from rlhf_kernels.integrations import verl``, then ``print(verl.patch())``.

verl's workers run in processes of Ray. Each has to be patched, and before its actor is made, which keeps the function
for entropies. Masked positions are 0 in our results, where verl's hold what its recursion passes along; nothing in verl
reads that.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.gae import masked_gae
from rlhf_kernels.integrations.common import are_plain, entropies
from rlhf_kernels.integrations.patching import Integration, Target
from rlhf_kernels.linear_log_prob import linear_selective_log_softmax_and_entropy
from rlhf_kernels.log_prob import selective_log_softmax
from rlhf_kernels.ppo_loss import REDUCTIONS, ppo_value_loss

LEFT_ALONE = {
    "verl.trainer.ppo.core_algos.compute_policy_loss_*": "they limit the log-ratio to 20 and give other statistics",
    "verl.trainer.ppo.core_algos.kl_penalty": "k3 is limited to 10; the others are one subtraction",
    "verl.utils.kernel.linear_cross_entropy": "its sums may go over a group of processes",
}


def _functional() -> Any:
    return importlib.import_module("verl.utils.torch_functional")


def _find() -> tuple[list[Target], dict[str, str]]:
    logits, core = _functional(), importlib.import_module("verl.trainer.ppo.core_algos")
    # Its callers import this class when they run, so its method is replaced.
    fused = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO
    entropy = "selective_log_softmax_and_entropy"
    targets = [
        Target(
            logits, "logprobs_from_logits", "selective_log_softmax", _log_probs, {"dffd21fe40eb806b": "0.9.1"}
        ),
        Target(logits, "entropy_from_logits", entropy, _entropy, {"f69d6578eeb3b2e4": "0.9.1"}),
        Target(
            logits, "entropy_from_logits_with_chunking", entropy, _entropy_float32, {"bde1bbefafdf7c31": "0.9.1"}
        ),
        Target(fused, "forward", f"linear_{entropy}", _fused, {"ade3cc04678fe81c": "0.9.1"}, source=fused),
        Target(core, "compute_gae_advantage_return", "masked_gae", _gae, {"fabcb104a5e4c1ee": "0.9.1"}),
        Target(core, "compute_value_loss", "ppo_value_loss", _value_loss, {"8e4bdebbeb6a425a": "0.9.1"}),
    ]  # fmt: skip
    return targets, LEFT_ALONE


_integration = Integration("verl", _find)
patch, unpatch = _integration.patch, _integration.unpatch


def _log_probs(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Any:
    if not are_plain(logits, labels):
        return NotImplemented
    # Where verl has flash-attn's kernel it gives float32, and writes the gradient over the logits.
    by_kernel = bool(_functional().FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE)
    over = inplace_backward and by_kernel and not logits.is_leaf
    result = selective_log_softmax(logits, labels, inplace_backward=over)
    return result if by_kernel else result.to(logits.dtype)


def _entropy(logits: Tensor) -> Any:
    return entropies(logits).to(logits.dtype) if are_plain(logits) else NotImplemented


def _entropy_float32(logits: Tensor, chunk_size: int = 2048) -> Any:
    return entropies(logits).float() if are_plain(logits) and logits.dim() == 2 else NotImplemented


def _fused(self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0) -> Any:
    if self.impl_backend != "torch" or type(vocab_weights) not in (Tensor, torch.nn.Parameter):
        return NotImplemented
    logprobs, entropy = linear_selective_log_softmax_and_entropy(
        hidden_states, vocab_weights, input_ids, temperature=temperature
    )
    return logprobs, entropy.to(hidden_states.dtype)


def _gae(token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> Any:
    advantages, returns = masked_gae(token_level_rewards, values, response_mask, gamma=gamma, lam=lam, whiten=False)
    # With the unbiased variance, which ours has not.
    return _functional().masked_whiten(advantages, response_mask), returns


def _value_loss(
    vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor, cliprange_value: float,
    loss_agg_mode: str = "token-mean", dp_size: int = 1, batch_num_tokens: int | None = None,
    global_batch_size: int | None = None, loss_scale_factor: int | None = None,
) -> Any:  # fmt: skip
    number = {"token-mean": batch_num_tokens, "token-sum": None}.get(loss_agg_mode, global_batch_size)
    needs_number = loss_agg_mode != "token-sum" and dp_size > 1
    if loss_agg_mode not in REDUCTIONS or number == 0 or (needs_number and number is None):
        return NotImplemented
    loss, statistics = ppo_value_loss(
        vpreds, values, returns, response_mask, clip_range=cliprange_value, reduction=loss_agg_mode, denominator=number
    )
    return loss * dp_size, statistics["clip_fraction"]
