"""Our ops inside OpenRLHF: ``from rlhf_kernels.integrations import openrlhf``, then ``print(openrlhf.patch())``.

OpenRLHF's workers run in processes of Ray, and each has to be patched.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.gae import masked_gae
from rlhf_kernels.integrations.patching import Patch, Replacement, check_source, counted
from rlhf_kernels.log_prob import selective_log_softmax, selective_log_softmax_and_entropy
from rlhf_kernels.ppo_loss import ppo_value_loss
from rlhf_kernels.ranking_loss import pairwise_ranking_loss

# The releases that each function was tried in, by the digest of its source.
KNOWN: dict[str, dict[str, str]] = {
    "log_probs_from_logits": {"92a21e3351d3ab12": "0.11.2"},
    "compute_entropy": {"07f5fe4f771b1ca3": "0.11.2"},
    "ValueLoss": {"6824e72655bb0a49": "0.11.2"},
    "PairWiseLoss": {"42bac0119323393a": "0.11.2"},
    "DPOLoss": {"f7e9a7d9ebf94583": "0.11.2"},
    "get_advantages_and_returns": {"a97e6d1840c289c1": "0.11.2"},
}
LEFT_ALONE = {
    "openrlhf.models.loss.PolicyLoss": "it limits the log-ratio to 20 and gives other statistics",
    "openrlhf.models.loss.LogExpLoss": "it overflows where a pair is far apart; PairWiseLoss is the same and does not",
    "openrlhf.models.utils.compute_approx_kl": "its estimates are limited to 10",
    "openrlhf.models.utils.compute_reward": "it takes the KL, and is two operations then",
}

_patches: list[Patch] = []
"""The one that is in force, if there is one."""


def patch() -> Patch:
    """Replaces OpenRLHF's functions in this process, until :func:`unpatch` is called or a ``with`` block of it ends.

    Returns:
        What was replaced and how often each ran, and what was left alone and why; ``print`` shows it.

    Raises:
        ImportError: OpenRLHF is not installed.
        ChangedFunctionError: a function is not that of a release tried; nothing was replaced then.
    """
    if _patches and _patches[-1].replaced:
        return _patches[-1]
    utils, loss = importlib.import_module("openrlhf.models.utils"), importlib.import_module("openrlhf.models.loss")
    places: list[tuple[Any, str, str, Any]] = [
        (utils, "log_probs_from_logits", "selective_log_softmax", _log_probs),
        (utils, "compute_entropy", "selective_log_softmax_and_entropy", _entropy),
        (loss.ValueLoss, "forward", "ppo_value_loss", _value_loss),
        (loss.PairWiseLoss, "forward", "pairwise_ranking_loss", _pairwise_loss),
        (loss.DPOLoss, "forward", "pairwise_ranking_loss", _dpo_loss),
    ]
    left_alone = dict(LEFT_ALONE)
    try:
        maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
        places.append((maker, "get_advantages_and_returns", "masked_gae", _gae))
    except ImportError as error:
        left_alone["openrlhf.trainer.ppo_utils.experience_maker"] = f"it can't be imported here ({error})"
    version = importlib.metadata.version("openrlhf")
    for place, name, *_ in places:
        source = place if name == "forward" else getattr(place, name)
        check_source(source, KNOWN[place.__name__ if name == "forward" else name], version)
    patched = Patch("openrlhf", version, left_alone=left_alone)
    for place, name, by, make in places:
        patched.replace(place, name, by, make)
    _patches.append(patched)
    return patched


def unpatch() -> None:
    """Puts OpenRLHF's own functions back."""
    while _patches:
        _patches.pop().unpatch()


def _serves_logits(logits: Any, labels: Any = None, temperature: float = 1.0) -> bool:
    plain = type(logits) in (Tensor, torch.nn.Parameter) and logits.dtype in checks.FLOATS and logits.dim() > 0
    return plain and (labels is None or labels.shape == logits.shape[:-1]) and temperature > 0


def _log_probs(replacement: Replacement) -> Any:
    def run(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        # OpenRLHF's divides the logits themselves by the temperature. Nothing reads them afterwards.
        return selective_log_softmax(logits, labels, temperature=temperature).to(logits.dtype)

    return counted(replacement, run, _serves_logits)


def _entropy(replacement: Replacement) -> Any:
    def run(logits: Tensor) -> Tensor:
        index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return selective_log_softmax_and_entropy(logits, index)[1].to(logits.dtype)

    return counted(replacement, run, _serves_logits)


def _value_loss(replacement: Replacement) -> Any:
    def run(
        self: Any, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None,
        dp_size: int = 1, batch_num_tokens: float | None = None, global_batch_size: float | None = None,
    ) -> Tensor:  # fmt: skip
        by_token = self.token_level_loss
        loss, _ = ppo_value_loss(
            values, old_values, returns, action_mask, clip_range=self.clip_eps,
            reduction="token-mean" if by_token else "seq-mean-token-mean",
        )  # fmt: skip
        everywhere = batch_num_tokens if by_token else global_batch_size
        if everywhere is None:
            return loss
        seen = torch.ones_like(values, dtype=torch.bool) if action_mask is None else action_mask != 0
        here = seen.sum() if by_token else seen.any(-1).sum()
        return loss * (here / everywhere * dp_size)

    def serves(self: Any, values: Any, *_: Any, **__: Any) -> bool:
        return values.dim() == 2 and (self.clip_eps is None or self.clip_eps > 0)

    return counted(replacement, run, serves)


def _pairs(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The mean of −log σ(chosen − rejected)."""
    scores = torch.stack([chosen.flatten(), rejected.flatten()], -1)
    ranks = torch.arange(2, device=scores.device).expand(scores.shape)
    return pairwise_ranking_loss(scores, ranks)[0]


def _pairwise_loss(replacement: Replacement) -> Any:
    def run(self: Any, chosen_reward: Tensor, reject_reward: Tensor, margin: None = None) -> Tensor:
        return _pairs(chosen_reward, reject_reward).to(chosen_reward.dtype)

    def serves(self: Any, chosen_reward: Any, reject_reward: Any, margin: Any = None) -> bool:
        return margin is None and chosen_reward.shape == reject_reward.shape

    return counted(replacement, run, serves)


def _dpo_loss(replacement: Replacement) -> Any:
    def run(
        self: Any, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        chosen = self.beta * (policy_chosen_logps - reference_chosen_logps)
        rejected = self.beta * (policy_rejected_logps - reference_rejected_logps)
        return _pairs(chosen, rejected).to(chosen.dtype), chosen.detach(), rejected.detach()

    def serves(self: Any, *_: Any, **__: Any) -> bool:
        return not self.ipo and self.label_smoothing == 0

    return counted(replacement, run, serves)


def _gae(replacement: Replacement) -> Any:
    def run(
        self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        # What is masked counts as 0, and the recursion goes on through it.
        if action_mask is not None:
            values, rewards = action_mask * values, action_mask * rewards
        return masked_gae(rewards, values, None, gamma=gamma, lam=lambd, whiten=False)

    return counted(replacement, run, lambda *_, **__: True)
