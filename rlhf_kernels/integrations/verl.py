"""Our ops inside verl: ``from rlhf_kernels.integrations import verl``, then ``print(verl.patch())``.

verl's workers run in processes of Ray. Each has to be patched, and before its actor is made, which keeps the function
for entropies. Masked positions are 0 in our results, where verl's hold what its recursion passes along; nothing in verl
reads that.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.gae import masked_gae
from rlhf_kernels.integrations.patching import Patch, Replacement, check_source, counted
from rlhf_kernels.linear_log_prob import linear_selective_log_softmax_and_entropy
from rlhf_kernels.log_prob import selective_log_softmax, selective_log_softmax_and_entropy
from rlhf_kernels.ppo_loss import REDUCTIONS, ppo_value_loss

# The releases that each function was tried in, by the digest of its source.
KNOWN: dict[str, dict[str, str]] = {
    "logprobs_from_logits": {"dffd21fe40eb806b": "0.9.1"},
    "entropy_from_logits": {"f69d6578eeb3b2e4": "0.9.1"},
    "entropy_from_logits_with_chunking": {"bde1bbefafdf7c31": "0.9.1"},
    "FusedLinearForPPO": {"ade3cc04678fe81c": "0.9.1"},
    "compute_gae_advantage_return": {"fabcb104a5e4c1ee": "0.9.1"},
    "compute_value_loss": {"8e4bdebbeb6a425a": "0.9.1"},
}
LEFT_ALONE = {
    "verl.trainer.ppo.core_algos.compute_policy_loss_*": "they limit the log-ratio to 20 and give other statistics",
    "verl.trainer.ppo.core_algos.kl_penalty": "k3 is limited to 10; the others are one subtraction",
    "verl.utils.kernel.linear_cross_entropy": "its sums may go over a group of processes",
}

_patches: list[Patch] = []
"""The one that is in force, if there is one."""


def patch() -> Patch:
    """Replaces verl's functions in this process, until :func:`unpatch` is called or a ``with`` block of it ends.

    Returns:
        What was replaced and how often each ran, and what was left alone and why; ``print`` shows it.

    Raises:
        ImportError: verl is not installed.
        ChangedFunctionError: a function is not that of a release tried; nothing was replaced then.
    """
    if _patches and _patches[-1].replaced:
        return _patches[-1]
    logits = importlib.import_module("verl.utils.torch_functional")
    fused = importlib.import_module("verl.utils.experimental.torch_functional")
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    places: list[tuple[Any, str, str, Any]] = [
        (logits, "logprobs_from_logits", "selective_log_softmax", _log_probs),
        (logits, "entropy_from_logits", "selective_log_softmax_and_entropy", _entropy),
        (logits, "entropy_from_logits_with_chunking", "selective_log_softmax_and_entropy", _entropy_float32),
        (fused, "FusedLinearForPPO", "linear_selective_log_softmax_and_entropy", _fused),
        (core, "compute_gae_advantage_return", "masked_gae", _gae),
        (core, "compute_value_loss", "ppo_value_loss", _value_loss),
    ]
    version = importlib.metadata.version("verl")
    for module, name, *_ in places:
        check_source(getattr(module, name), KNOWN[name], version)
    patched = Patch("verl", version, left_alone=LEFT_ALONE)
    for module, name, by, make in places:
        if name == "FusedLinearForPPO":  # whose callers import it when they run
            module, name = module.FusedLinearForPPO, "forward"
        patched.replace(module, name, by, make)
    _patches.append(patched)
    return patched


def unpatch() -> None:
    """Puts verl's own functions back."""
    while _patches:
        _patches.pop().unpatch()


def _serves_logits(logits: Any, labels: Any = None, *_: Any, **__: Any) -> bool:
    plain = type(logits) in (Tensor, torch.nn.Parameter) and logits.dtype in checks.FLOATS and logits.dim() > 0
    return plain and (labels is None or labels.shape == logits.shape[:-1])


def _log_probs(replacement: Replacement) -> Any:
    def run(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        # Where verl has flash-attn's kernel it gives float32, and writes the gradient over the logits.
        by_kernel = bool(importlib.import_module("verl.utils.torch_functional").FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE)
        over = inplace_backward and by_kernel and not logits.is_leaf
        result = selective_log_softmax(logits, labels, inplace_backward=over)
        return result if by_kernel else result.to(logits.dtype)

    return counted(replacement, run, _serves_logits)


def _entropies(logits: Tensor) -> Tensor:
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return selective_log_softmax_and_entropy(logits, index)[1]


def _entropy(replacement: Replacement) -> Any:
    def run(logits: Tensor) -> Tensor:
        return _entropies(logits).to(logits.dtype)

    return counted(replacement, run, _serves_logits)


def _entropy_float32(replacement: Replacement) -> Any:
    def run(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        return _entropies(logits).float()

    def serves(logits: Any, chunk_size: int = 2048) -> bool:
        return _serves_logits(logits) and logits.dim() == 2

    return counted(replacement, run, serves)


def _fused(replacement: Replacement) -> Any:
    def run(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = linear_selective_log_softmax_and_entropy(
            hidden_states, vocab_weights, input_ids, temperature=temperature
        )
        return logprobs, entropy.to(hidden_states.dtype)

    def serves(self: Any, hidden_states: Any, vocab_weights: Any, *_: Any, **__: Any) -> bool:
        return self.impl_backend == "torch" and type(vocab_weights) in (Tensor, torch.nn.Parameter)

    return counted(replacement, run, serves)


def _gae(replacement: Replacement) -> Any:
    def run(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        advantages, returns = masked_gae(token_level_rewards, values, response_mask, gamma=gamma, lam=lam, whiten=False)
        # With the unbiased variance, which ours has not.
        whiten = importlib.import_module("verl.utils.torch_functional").masked_whiten
        return whiten(advantages, response_mask), returns

    return counted(replacement, run, lambda *_, **__: True)


def _value_loss(replacement: Replacement) -> Any:
    def run(
        vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor, cliprange_value: float,
        loss_agg_mode: str = "token-mean", dp_size: int = 1, batch_num_tokens: int | None = None,
        global_batch_size: int | None = None, loss_scale_factor: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss, statistics = ppo_value_loss(
            vpreds, values, returns, response_mask, clip_range=cliprange_value, reduction=loss_agg_mode
        )
        everywhere = {"token-mean": batch_num_tokens, "token-sum": None}.get(loss_agg_mode, global_batch_size)
        if everywhere is not None:  # of all processes, where ours is the mean of this one
            seen = response_mask != 0
            here = seen.sum() if loss_agg_mode == "token-mean" else seen.any(-1).sum()
            loss = loss * (here / everywhere)
        return loss * dp_size, statistics["clip_fraction"]

    def serves(*args: Any, loss_agg_mode: str = "token-mean", dp_size: int = 1, **counts: Any) -> bool:
        mode = args[5] if len(args) > 5 else loss_agg_mode
        if len(args) > 6:  # nobody passes so many by position
            return False
        known = counts.get("batch_num_tokens" if mode == "token-mean" else "global_batch_size") is not None
        return mode == "token-sum" or (mode in REDUCTIONS and (known or dp_size == 1))

    return counted(replacement, run, serves)
