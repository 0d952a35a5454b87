"""Our ops inside verl: ``from rlhf_kernels.integrations import verl``, then ``print(verl.patch())``.

verl's workers run in processes of Ray. Each has to be patched, and before its actor is made, which keeps the function
for entropies. Masked positions are 0 in our results, where verl's hold what its recursion passes along; nothing in verl
reads that. Of a batch with one position or none verl's GAE raises, and ours gives zeros.
"""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.gae import masked_gae
from rlhf_kernels.integrations.common import are_plain, divided_by, entropies
from rlhf_kernels.integrations.patching import Integration, Target
from rlhf_kernels.linear_log_prob import linear_selective_log_softmax_and_entropy
from rlhf_kernels.log_prob import selective_log_softmax
from rlhf_kernels.ppo_loss import REDUCTIONS, ppo_policy_loss, ppo_value_loss

# verl limits the ratio of a sequence to this, and ours does not.
GSPO_LARGEST_RATIO = math.exp(10)
LEFT_ALONE = {
    "verl.trainer.ppo.core_algos.compute_policy_loss_*": "the others than vanilla, gspo and cispo are other formulas",
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
        Target(core, "compute_policy_loss_vanilla", "ppo_policy_loss", _vanilla, {"1a0214517a6dbfc8": "0.9.1"}),
        Target(core, "compute_policy_loss_gspo", "ppo_policy_loss", _gspo, {"fd4ceb495b6b2c75": "0.9.1"}),
        Target(core, "compute_policy_loss_cispo", "ppo_policy_loss", _cispo, {"ed3e38ae6bcfd1fa": "0.9.1"}),
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
    return masked_gae(token_level_rewards, values, response_mask, gamma=gamma, lam=lam, whiten="unbiased")


def _reduction(
    mode: str, dp_size: int = 1, batch_num_tokens: Any = None, global_batch_size: Any = None,
    loss_scale_factor: int | None = None,
) -> tuple[dict[str, Any], Any] | None:  # fmt: skip
    """verl's way of adding up a loss as options of ours, and what that is divided by; None where ours has none."""
    if mode == "token-sum":
        return {"reduction": mode}, 1
    number = batch_num_tokens if mode == "token-mean" else global_batch_size
    if mode not in REDUCTIONS or (dp_size > 1 and number is None):
        return None
    options = divided_by(number, mode == "token-mean")
    if mode != "token-mean":
        options["reduction"] = mode
    return options, 1 if number is None else number


def _value_loss(
    vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor, cliprange_value: float,
    loss_agg_mode: str = "token-mean", dp_size: int = 1, batch_num_tokens: Any = None, global_batch_size: Any = None,
    loss_scale_factor: int | None = None,
) -> Any:  # fmt: skip
    reduction = _reduction(loss_agg_mode, dp_size, batch_num_tokens, global_batch_size)
    if reduction is None:
        return NotImplemented
    options, number = reduction
    loss, statistics = ppo_value_loss(vpreds, values, returns, response_mask, clip_range=cliprange_value, **options)
    return loss / number * dp_size, statistics["clip_fraction"]


def _policy_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str | None = None,
    config: Any = None, rollout_is_weights: Tensor | None = None, *, usual_mode: str = "token-mean",
    with_dual_clip: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """One of verl's losses by the options of ours, with verl's statistics."""
    if config is None or rollout_is_weights is not None or log_prob.dtype == torch.float64:
        return NotImplemented
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    counts = dict(config.global_batch_info)
    reduction = _reduction(loss_agg_mode or usual_mode, **counts)
    if with_dual_clip:
        options["dual_clip"] = config.get("clip_ratio_c", 3.0)
    largest = math.inf if options.get("surrogate") == "cispo" else 1
    if reduction is None or not (low > 0 and 0 < high <= largest):
        return NotImplemented
    # A ratio is above 0, so that a lower limit of 0 is none, as a negative one is.
    loss, statistics = ppo_policy_loss(
        log_prob, old_log_prob, advantages, response_mask, clip_range=min(low, 1.0), clip_range_high=high,
        **reduction[0], **options,
    )  # fmt: skip
    kl = -statistics["log_ratio_mean"]
    limit = options.get("log_ratio_clamp")
    if limit is not None:
        with torch.no_grad():
            kl = _functional().masked_mean((old_log_prob - log_prob).clamp(-limit, limit), response_mask)
    # verl waits for each of its statistics; these are waited for together.
    found = {name: x for name, x in statistics.items() if name != "log_ratio_mean"} | {"kl": kl}
    figures = dict(zip(found, torch.stack([x.float() for x in found.values()]).tolist(), strict=True))
    # Such a ratio is known only now. It is rare enough for the loss to be computed again, by verl.
    if options.get("ratio_level") == "sequence" and not figures["ratio_max_deviation"] < GSPO_LARGEST_RATIO - 1:
        return NotImplemented
    return loss / reduction[1] * counts.get("dp_size", 1), {
        "actor/pg_clipfrac": figures["clip_fraction"],
        "actor/ppo_kl": figures["kl"],
        "actor/pg_clipfrac_lower": figures.get("dual_clip_fraction", 0.0),
    }


_vanilla = partial(_policy_loss, with_dual_clip=True, log_ratio_clamp=20.0)
_gspo = partial(_policy_loss, usual_mode="seq-mean-token-mean", ratio_level="sequence")
_cispo = partial(_policy_loss, surrogate="cispo", log_ratio_clamp=20.0)
