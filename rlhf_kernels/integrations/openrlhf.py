"""Our ops inside OpenRLHF: ``from rlhf_kernels.integrations import openrlhf``, then ``print(openrlhf.patch())``.

OpenRLHF's workers run in processes of Ray, and each has to be patched.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.gae import masked_gae
from rlhf_kernels.integrations.common import are_plain, divided_by, entropies, pair_loss
from rlhf_kernels.integrations.patching import Integration, Target
from rlhf_kernels.log_prob import selective_log_softmax
from rlhf_kernels.ppo_loss import ppo_policy_loss, ppo_value_loss

LEFT_ALONE = {
    "openrlhf.models.loss.LogExpLoss": "it overflows where a pair is far apart; PairWiseLoss is the same and does not",
    "openrlhf.models.utils.compute_approx_kl": "its estimates are limited to 10",
    "openrlhf.models.utils.compute_reward": "it takes the KL, and is two operations then",
}


def _find() -> tuple[list[Target], dict[str, str]]:
    utils, loss = importlib.import_module("openrlhf.models.utils"), importlib.import_module("openrlhf.models.loss")
    entropy, ranking = "selective_log_softmax_and_entropy", "pairwise_ranking_loss"

    def forward(name: str, by: str, function: Any, digest: str) -> Target:
        owner = getattr(loss, name)
        return Target(owner, "forward", by, function, {digest: "0.11.2"}, source=owner)

    targets = [
        Target(
            utils, "log_probs_from_logits", "selective_log_softmax", _log_probs, {"92a21e3351d3ab12": "0.11.2"}
        ),
        Target(utils, "compute_entropy", entropy, _entropy, {"07f5fe4f771b1ca3": "0.11.2"}),
        forward("PolicyLoss", "ppo_policy_loss", _policy_loss, "c754501b121765a2"),
        forward("ValueLoss", "ppo_value_loss", _value_loss, "6824e72655bb0a49"),
        forward("PairWiseLoss", ranking, _pairwise_loss, "42bac0119323393a"),
        forward("DPOLoss", ranking, _dpo_loss, "f7e9a7d9ebf94583"),
    ]  # fmt: skip
    try:
        maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    except ImportError as error:
        why = f"it can't be imported here ({error})"
        return targets, LEFT_ALONE | {"openrlhf.trainer.ppo_utils.experience_maker": why}
    gae = Target(maker, "get_advantages_and_returns", "masked_gae", _gae, {"a97e6d1840c289c1": "0.11.2"})
    return [*targets, gae], LEFT_ALONE


_integration = Integration("openrlhf", _find)
patch, unpatch = _integration.patch, _integration.unpatch


def _log_probs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Any:
    if not are_plain(logits, labels) or temperature <= 0:
        return NotImplemented
    # OpenRLHF's divides the logits themselves by the temperature. Nothing reads them afterwards.
    return selective_log_softmax(logits, labels, temperature=temperature).to(logits.dtype)


def _entropy(logits: Tensor) -> Any:
    return entropies(logits).to(logits.dtype) if are_plain(logits) else NotImplemented


def _policy_loss(
    self: Any, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None, dp_size: int = 1, batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> Any:  # fmt: skip
    # GSPO's gradient is not ours where the advantages of a sequence differ.
    own = self.policy_loss_type == "ppo" and self.is_correction_level == "off"
    ranges = self.clip_eps_low > 0 and 0 < self.clip_eps_high <= 1
    if not (own and ranges) or log_probs.dim() != 2 or log_probs.dtype == torch.float64:
        return NotImplemented
    number = batch_num_tokens if self.token_level_loss else global_batch_size
    # A ratio is above 0, so that a lower limit of 0 is none, as a negative one is.
    loss, statistics = ppo_policy_loss(
        log_probs, old_log_probs, advantages, action_mask, clip_range=min(self.clip_eps_low, 1.0),
        clip_range_high=self.clip_eps_high, dual_clip=self.dual_clip, log_ratio_clamp=20.0,
        **divided_by(number, self.token_level_loss),
    )  # fmt: skip
    loss = loss if number is None else loss / number * dp_size
    return loss, statistics["clip_fraction"], -statistics["log_ratio_mean"], None, None


def _value_loss(
    self: Any, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None,
    dp_size: int = 1, batch_num_tokens: Any = None, global_batch_size: Any = None,
) -> Any:  # fmt: skip
    if values.dim() != 2 or (self.clip_eps is not None and self.clip_eps <= 0):
        return NotImplemented
    number = batch_num_tokens if self.token_level_loss else global_batch_size
    loss, _ = ppo_value_loss(
        values, old_values, returns, action_mask, clip_range=self.clip_eps, **divided_by(number, self.token_level_loss)
    )
    return loss if number is None else loss / number * dp_size


def _pairwise_loss(self: Any, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Any:
    if chosen_reward.shape != reject_reward.shape or (margin is not None and margin.shape != chosen_reward.shape):
        return NotImplemented
    return pair_loss(chosen_reward if margin is None else chosen_reward - margin, reject_reward)


def _dpo_loss(
    self: Any, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> Any:  # fmt: skip
    if self.ipo or self.label_smoothing != 0:
        return NotImplemented
    chosen = self.beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = self.beta * (policy_rejected_logps - reference_rejected_logps)
    return pair_loss(chosen, rejected), chosen.detach(), rejected.detach()


def _gae(self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float) -> Any:
    # What is masked counts as 0, and the recursion goes on through it.
    if action_mask is not None:
        values, rewards = action_mask * values, action_mask * rewards
    return masked_gae(rewards, values, None, gamma=gamma, lam=lambd, whiten=False)
