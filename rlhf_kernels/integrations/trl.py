"""Our ops inside TRL's trainers: ``from rlhf_kernels.integrations import trl``, then ``print(trl.patch())``.

TRL computes log-probs and entropies in a few functions that its trainers share. They are replaced by ops that are the
same function: of the same shapes and masks, with results of the same dtype. What those don't serve still goes to TRL's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.integrations.patching import Patch, Replacement, check_source, counted
from rlhf_kernels.linear_log_prob import linear_selective_log_softmax, linear_selective_log_softmax_and_entropy
from rlhf_kernels.log_prob import selective_log_softmax, selective_log_softmax_and_entropy

# The releases that each function was tried in, by the digest of its source.
KNOWN: dict[str, dict[str, str]] = {
    "selective_log_softmax": {"e55428ff89caff25": "1.16.0", "15e23c5adee5fb09": "1.9.2"},
    "entropy_from_logits": {"040e498bee457afa": "1.16.0", "cfeed25ed40872ba": "1.9.2"},
    "selective_log_softmax_and_entropy": {"69b4d4c0971d9a1b": "1.16.0"},
    "ChunkedLogProbFunction": {"3661e8975a9f64cc": "1.16.0"},
}
LEFT_ALONE = {
    "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss": "its forms of the loss are more than ppo_policy_loss has",
    "trl.trainer.rloo_trainer.RLOOTrainer._compute_loss": "it takes whole sequences for actions",
    "trl.experimental.ppo.ppo_trainer.masked_whiten": "it divides by the unbiased variance",
}

_patches: list[Patch] = []
"""The one that is in force, if there is one."""


def patch() -> Patch:
    """Replaces TRL's functions in this process, until :func:`unpatch` is called or a ``with`` block of it ends.

    Returns:
        What was replaced and how often each ran, and what was left alone and why; ``print`` shows it.

    Raises:
        ImportError: TRL is not installed.
        ChangedFunctionError: a function is not that of a release tried; nothing was replaced then.
    """
    if _patches and _patches[-1].replaced:
        return _patches[-1]
    utils = importlib.import_module("trl.trainer.utils")
    version = importlib.metadata.version("trl")
    places: list[tuple[Any, str, str, Any]] = [
        (utils, "selective_log_softmax", "selective_log_softmax", _log_softmax),
        (utils, "entropy_from_logits", "selective_log_softmax_and_entropy", _entropy),
    ]
    if _has_kernels():
        kernels = importlib.import_module("trl.kernels.chunked_logprob")
        places += [
            (utils, "selective_log_softmax_and_entropy", "selective_log_softmax_and_entropy", _log_softmax_and_entropy),
            (kernels, "ChunkedLogProbFunction", "linear_selective_log_softmax_and_entropy", _chunked),
        ]
    for module, name, *_ in places:
        check_source(getattr(module, name), KNOWN[name], version)
    patched = Patch("trl", version, left_alone=LEFT_ALONE)
    for module, name, by, make in places:
        patched.replace(module, name, by, make)
    _patches.append(patched)
    return patched


def unpatch() -> None:
    """Puts TRL's own functions back."""
    while _patches:
        _patches.pop().unpatch()


def _has_kernels() -> bool:
    """Whether this TRL has kernels of its own, as since 1.16."""
    return importlib.util.find_spec("trl.kernels") is not None


def _result_dtype(logits: Tensor) -> torch.dtype:
    """TRL's kernels, on GPUs, give float32, and its formulas the dtype of the logits."""
    by_kernel = logits.device.type in ("cuda", "xpu") and logits.dtype != torch.float64 and logits.dim() <= 3
    return torch.float32 if by_kernel and _has_kernels() else logits.dtype


def _serves(logits: Any, index: Any = None, *, temperature: float = 1.0, row_mask: Any = None, **_: Any) -> bool:
    plain = type(logits) in (Tensor, torch.nn.Parameter) and logits.dtype in checks.FLOATS and logits.dim() > 0
    one_a_row = index is None or index.shape == logits.shape[:-1]
    return plain and one_a_row and temperature > 0 and (row_mask is None or row_mask.shape == logits.shape[:-1])


def _log_softmax(replacement: Replacement) -> Any:
    def run(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Tensor:
        result = selective_log_softmax(logits, index, temperature=temperature, mask=_as_mask(row_mask))
        return result.to(_result_dtype(logits))

    return counted(replacement, run, _serves)


def _entropy(replacement: Replacement) -> Any:
    def run(logits: Tensor, chunk_size: int = 128) -> Tensor:
        index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return selective_log_softmax_and_entropy(logits, index)[1].to(_result_dtype(logits))

    def serves(logits: Any, chunk_size: int = 128) -> bool:
        return _serves(logits)

    return counted(replacement, run, serves)


def _log_softmax_and_entropy(replacement: Replacement) -> Any:
    def run(
        logits: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        results = selective_log_softmax_and_entropy(logits, index, temperature=temperature, mask=_as_mask(row_mask))
        logprobs, entropy = (x.to(_result_dtype(logits)) for x in results)
        return logprobs, entropy if entropy_requires_grad else entropy.detach()

    return counted(replacement, run, _serves)


def _as_mask(row_mask: Tensor | None) -> Tensor | None:
    """TRL drops rows where the mask is 0, whatever it is elsewhere."""
    return None if row_mask is None else row_mask != 0


SERVED = {"log_probs", "entropy", "mean_logits"}


def _chunked(replacement: Replacement) -> Any:
    """A class with the ``apply`` of TRL's autograd function."""
    OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def run(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        softcap: float | None = None, scale: float = 1.0, outputs: tuple[str, ...] = OPTIONAL,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        # A factor s before a cap c is what a cap of c/s and a temperature of 1/s are.
        options: dict[str, Any] = {"bias": bias, "temperature": temperature / scale}
        if softcap is not None:
            options["softcap"] = softcap / scale
        entropy = mean = None
        if "entropy" in outputs:
            logprobs, entropy = linear_selective_log_softmax_and_entropy(hidden, weight, targets, **options)
        else:
            logprobs = linear_selective_log_softmax(hidden, weight, targets, **options)
        if "mean_logits" in outputs:
            with torch.no_grad():
                mean = hidden.float() @ weight.float().mean(0)
                mean = (mean if bias is None else mean + bias.float().mean()) * (scale / temperature)
        return logprobs, entropy, None, mean, None

    def serves(
        hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, chunk_size: int,
        softcap: float | None = None, scale: float = 1.0, outputs: tuple[str, ...] = OPTIONAL,
    ) -> bool:  # fmt: skip
        served = SERVED if softcap is None else SERVED - {"mean_logits"}
        # DeepSpeed gathers a sharded weight once more for the backward, and TRL's function asks it to.
        return set(outputs) <= served and scale > 0 and temperature > 0 and not hasattr(weight, "ds_id")

    class ChunkedLogProb:
        apply = staticmethod(_counted_apply(replacement, run, serves))

    return ChunkedLogProb


def _counted_apply(replacement: Replacement, run: Any, serves: Any) -> Any:
    def apply(*args: Any, **options: Any) -> Any:
        if not serves(*args, **options):
            return replacement.original.apply(*args, **options)
        replacement.calls += 1
        return run(*args, **options)

    return apply
