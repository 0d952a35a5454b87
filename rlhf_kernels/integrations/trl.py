"""Our ops inside TRL's trainers: ``from rlhf_kernels.integrations import trl``, then ``print(trl.patch())``.

TRL computes log-probs and entropies in a few functions that its trainers share. They are replaced by ops that are the
same function: of the same shapes and masks, with results of the same dtype. What those don't serve still goes to TRL's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.integrations.common import are_plain, entropies, fold_scale, pair_loss
from rlhf_kernels.integrations.patching import Integration, Target
from rlhf_kernels.linear_log_prob import linear_selective_log_softmax_and_rank
from rlhf_kernels.log_prob import selective_log_softmax, selective_log_softmax_and_entropy

LEFT_ALONE = {
    "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss": "its forms of the loss are more than ppo_policy_loss has",
    "trl.trainer.rloo_trainer.RLOOTrainer._compute_loss": "it takes whole sequences for actions",
    "trl.experimental.ppo.ppo_trainer.masked_whiten": "it whitens what is there; ours does so within GAE",
}


def _find() -> tuple[list[Target], dict[str, str]]:
    utils = importlib.import_module("trl.trainer.utils")
    rewards = importlib.import_module("trl.trainer.reward_trainer").RewardTrainer
    targets = [
        Target(
            utils, "selective_log_softmax", "selective_log_softmax", _log_softmax,
            {"e55428ff89caff25": "1.16.0", "15e23c5adee5fb09": "1.9.2"},
        ),
        Target(
            utils, "entropy_from_logits", "selective_log_softmax_and_entropy", _entropy,
            {"040e498bee457afa": "1.16.0", "cfeed25ed40872ba": "1.9.2"},
        ),
        Target(
            rewards, "compute_loss", "pairwise_ranking_loss", functools.partial(_reward_loss, rewards.compute_loss),
            {"ec4fad890ecfab14": "1.16.0", "975ff55abeee1009": "1.9.2"},
        ),
    ]  # fmt: skip
    if _has_kernels():
        chunked = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
        targets += [
            Target(
                utils, "selective_log_softmax_and_entropy", "selective_log_softmax_and_entropy",
                _log_softmax_and_entropy, {"69b4d4c0971d9a1b": "1.16.0"},
            ),
            Target(
                chunked, "apply", "linear_selective_log_softmax_and_entropy", _chunked,
                {"3661e8975a9f64cc": "1.16.0"}, source=chunked,
            ),
        ]  # fmt: skip
    return targets, LEFT_ALONE


_integration = Integration("trl", _find)
patch, unpatch = _integration.patch, _integration.unpatch


def _has_kernels() -> bool:
    """Whether this TRL has kernels of its own, as since 1.16."""
    return importlib.util.find_spec("trl.kernels") is not None


def _result_dtype(logits: Tensor) -> torch.dtype:
    """TRL's kernels, on GPUs, give float32, and its formulas the dtype of the logits."""
    by_kernel = logits.device.type in ("cuda", "xpu") and logits.dtype != torch.float64 and logits.dim() <= 3
    return torch.float32 if by_kernel and _has_kernels() else logits.dtype


def _serves(logits: Any, index: Tensor, temperature: float, row_mask: Tensor | None) -> bool:
    return are_plain(logits, index) and temperature > 0 and (row_mask is None or row_mask.shape == logits.shape[:-1])


def _as_mask(row_mask: Tensor | None) -> Tensor | None:
    """TRL drops rows where the mask is 0, whatever it is elsewhere."""
    return None if row_mask is None else row_mask != 0


def _log_softmax(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Any:
    if not _serves(logits, index, temperature, row_mask):
        return NotImplemented
    result = selective_log_softmax(logits, index, temperature=temperature, mask=_as_mask(row_mask))
    return result.to(_result_dtype(logits))


def _entropy(logits: Tensor, chunk_size: int = 128) -> Any:
    return entropies(logits).to(_result_dtype(logits)) if are_plain(logits) else NotImplemented


def _log_softmax_and_entropy(
    logits: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Any:  # fmt: skip
    if not _serves(logits, index, temperature, row_mask):
        return NotImplemented
    results = selective_log_softmax_and_entropy(logits, index, temperature=temperature, mask=_as_mask(row_mask))
    logprobs, entropy = (x.to(_result_dtype(logits)) for x in results)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def _reward_loss(
    theirs: Callable[..., Any], self: Any, model: Any, inputs: Any, return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:  # fmt: skip
    """TRL's own for the scores and for what it logs of them, and our loss of the scores."""
    if self.args.center_rewards_coefficient is not None:
        return NotImplemented
    loss, outputs = theirs(self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    loss = pair_loss(chosen - inputs["margin"] if "margin" in inputs else chosen, rejected).to(loss.dtype)
    return (loss, outputs) if return_outputs else loss


OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _chunked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
    softcap: float | None = None, scale: float = 1.0, outputs: tuple[str, ...] = OPTIONAL,
) -> Any:  # fmt: skip
    served = {"log_probs", "entropy", "is_top1"} | ({"mean_logits"} if softcap is None else set())
    # DeepSpeed gathers a sharded weight once more for the backward, and TRL's function asks it to.
    if not (set(outputs) <= served and scale > 0 and temperature > 0) or hasattr(weight, "ds_id"):
        return NotImplemented
    softcap, own_temperature = fold_scale(softcap, scale)
    logprobs, entropy, top = linear_selective_log_softmax_and_rank(
        hidden, weight, targets, bias=bias, softcap=softcap, temperature=temperature * own_temperature,
        with_entropy="entropy" in outputs,
    )  # fmt: skip
    if "is_top1" in outputs and top is None:
        return NotImplemented
    mean = None
    if "mean_logits" in outputs:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
            mean = (mean if bias is None else mean + bias.float().mean()) * (scale / temperature)
    return logprobs, entropy, None, mean, top if "is_top1" in outputs else None
