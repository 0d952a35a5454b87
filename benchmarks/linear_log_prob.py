"""Log-probs and losses from hidden states and the output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import batches
import log_prob
import ppo_loss
import torch
import torch.nn.functional as F
from bounds import Work
from cases import BACKWARD, FORWARD, Case, Implementation, Inputs, eager, ours
from torch import Tensor

import rlhf_kernels

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}

# Sequences, response positions, hidden size, vocabulary.
SIZES = {
    "cpu": (8, 256, 1024, 128_256),
    "cuda": (8, 1024, 4096, 128_256),
    "quick": (4, 32, 64, 4096),
}
GRPO_TAKES = ("hidden", "weight", "index", "old_logprobs", "sequence_advantages", "mask")
ROWS = ("hidden", "index", "labels", "old_logprobs", "advantages", "sequence_advantages", "mask")


def cases(scale: str) -> list[Case]:
    """Log-probs, and the two losses, which can turn logits into their gradient at once."""
    sizes = SIZES[scale]
    return [
        _case(
            rlhf_kernels.linear_selective_log_softmax,
            sizes,
            ("hidden", "weight", "index"),
            (FORWARD, BACKWARD) if scale != "quick" else (BACKWARD,),
            eager(log_probs),
            Implementation("torch linear_cross_entropy", lambda: partial(_torch_log_probs, options=None)),
            Implementation("torch linear_cross_entropy chunked", lambda: partial(_torch_log_probs, options=_chunked())),
            Implementation("Liger chunked log-probs", _liger_log_probs, install="liger-kernel"),
            Implementation("verl's kernel", _verl_log_probs, install="verl", devices=("cuda",)),
            *_cut(_cut_log_probs),
        ),
        _case(
            rlhf_kernels.linear_selective_log_softmax,
            sizes,
            ("hidden", "weight", "index"),
            (BACKWARD,),
            eager(log_probs),
            spread=22,
        ),
        _case(
            rlhf_kernels.linear_ppo_policy_loss,
            sizes,
            ("hidden", "weight", "index", "old_logprobs", "advantages", "mask"),
            (BACKWARD,),
            eager(policy_loss),
            Implementation(
                "Liger GRPO loss",
                _liger_policy_loss,
                GRPO_TAKES,
                install="liger-kernel",
            ),
            Implementation(
                "matmul, Liger's Triton GRPO loss", _liger_triton_loss, GRPO_TAKES, install="liger-kernel",
                devices=("cuda",),
            ),
        ),
        _case(
            rlhf_kernels.linear_cross_entropy,
            sizes,
            ("hidden", "weight", "labels"),
            (BACKWARD,),
            eager(cross_entropy),
            Implementation("torch linear_cross_entropy", lambda: partial(_torch_loss, options=None)),
            Implementation("torch linear_cross_entropy chunked", lambda: partial(_torch_loss, options=_chunked())),
            Implementation("Liger fused linear cross-entropy", _liger_loss, install="liger-kernel"),
            *_cut(_cut_loss),
        ),
    ]  # fmt: skip


def _case(
    op: Callable[..., Any], sizes: tuple[int, int, int, int], takes: tuple[str, ...], steps: tuple[str, ...],
    *peers: Implementation, spread: float = 2,
) -> Case:  # fmt: skip
    """``spread`` is the standard deviation of the logits. At 22 most probabilities are denormal numbers or 0."""
    batch, length, width, vocabulary = sizes
    return Case(
        op.__name__,
        f"N={batch * length} D={width} V={vocabulary}" + (f" peaked (σ={spread:g})" if spread != 2 else ""),
        partial(_inputs, *sizes, spread),
        takes,
        op,
        (ours(op), *peers),
        partial(_work, masked="mask" in takes or "labels" in takes),
        gradients=("hidden", "weight"),
        steps=steps,
        rows=ROWS,
        chunk=1,
        share=_share,
    )


def _inputs(
    batch: int, length: int, width: int, vocabulary: int, spread: float, generator: torch.Generator, dtype: torch.dtype
) -> Inputs:
    """Every sequence has one advantage, as in GRPO, so that Liger's loss computes the same thing."""
    device = generator.device
    advantages = batches.normal((batch, 1), generator, torch.float32)
    mask = batches.ragged_mask(batch, length, generator)
    index = torch.randint(vocabulary, (batch, length), generator=generator, device=device)
    hidden = batches.normal((batch, length, width), generator, dtype)
    weight = batches.normal((vocabulary, width), generator, dtype, spread * width**-0.5)
    chosen = weight[index].float()
    logits = batches.normal((vocabulary,), generator, torch.float32, spread)
    old = (hidden.float() * chosen).sum(-1) - logits.logsumexp(0)
    return {
        "hidden": hidden,
        "weight": weight,
        "index": index,
        "labels": torch.where(mask != 0, index, -100),
        "old_logprobs": old + batches.normal((batch, length), generator, torch.float32, 0.1),
        "advantages": advantages.expand(batch, length).contiguous(),
        "sequence_advantages": advantages.squeeze(1),
        "mask": mask,
    }


def _share(chunk: Inputs, whole: Inputs) -> float:
    return float(chunk["mask"].sum() / whole["mask"].sum())


def _work(inputs: Inputs, step: str, *, masked: bool) -> Work:
    """One matmul forward and two backward. An op that keeps neither logits nor their gradient may need a fourth.

    With a mask only the rows that count are included, although many implementations multiply all rows.
    """
    mask, weight = inputs["mask"], inputs["weight"]
    rows = int(mask.sum()) if masked else mask.numel()
    flops = 2 * rows * weight.numel()
    size = rows * weight.shape[1] * weight.element_size() + weight.nbytes
    return Work(size, flops=flops) if step == FORWARD else Work(2 * size, size, 3 * flops)


def log_probs(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """All logits in the dtype of the hidden states, then the log-softmax of all of them in float32."""
    return log_prob.log_probs(hidden @ weight.T, index)


def policy_loss(
    hidden: Tensor, weight: Tensor, index: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss of these log-probs, without the entropy that ours reports beside it."""
    return ppo_loss.policy_loss(log_probs(hidden, weight, index), old_logprobs, advantages, mask)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss as causal language models compute it."""
    return F.cross_entropy((hidden @ weight.T).float().flatten(0, 1), labels.flatten())


def _chunked() -> Any:
    return torch.nn.LinearCrossEntropyOptions()


def _torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, options: Any, reduction: str = "mean") -> Tensor:
    return F.linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), reduction=reduction, options=options)


def _torch_log_probs(hidden: Tensor, weight: Tensor, index: Tensor, *, options: Any) -> Tensor:
    return -_torch_loss(hidden, weight, index, options=options, reduction="none").view(index.shape)


def _liger_log_probs() -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward


def _liger_policy_loss() -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
    return lambda hidden, weight, index, old, advantages, mask: loss(
        hidden, weight, index, mask, advantages, old_per_token_logps=old
    )[0]


def _liger_triton_loss() -> Callable[..., Tensor]:
    """Of all logits, of which the last in a sequence predicts nothing: one position more than there are tokens."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(hidden: Tensor, weight: Tensor, index: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        logits = F.pad(hidden, (0, 0, 0, 1)) @ weight.T
        return triton_grpo_loss(
            logits, old, None, index, advantages, mask, temperature=1.0, beta=0.0, eps_low=ppo_loss.CLIP,
            eps_high=ppo_loss.CLIP, loss_type="bnpo", reduce=True,
        )[0]  # fmt: skip

    return loss


def _verl_log_probs() -> Callable[..., Tensor]:
    """It computes entropies too, and always."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, index: linear_cross_entropy(hidden, weight, index, 1.0, "none")[0].view(index.shape)


def _liger_loss() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden.flatten(0, 1), labels.flatten())


def _cut(load: Callable[..., Any]) -> Iterator[Implementation]:
    """As it is without options, and without its filter, which sets small gradients to 0. A CPU has no filter."""
    name = "cut-cross-entropy"
    yield Implementation(name, partial(load, exact=False), install=name)
    yield Implementation(f"{name} exact", partial(load, exact=True), install=name, devices=("cuda",))


def _cut_loss(*, exact: bool, reduction: str = "mean") -> Callable[..., Tensor]:
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    # Versions that have the mode sum its gradients in float32 as well.
    has_mode = hasattr(LinearCrossEntropyImpl, "CCE_EXACT")
    options = {} if not exact else {"impl": "cce_exact"} if has_mode else {"filter_eps": None}

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        chosen = options if hidden.is_cuda else {"impl": "torch_compile"}
        return linear_cross_entropy(hidden, weight, labels, reduction=reduction, **chosen)

    return loss


def _cut_log_probs(*, exact: bool) -> Callable[..., Tensor]:
    loss = _cut_loss(exact=exact, reduction="none")
    return lambda hidden, weight, index: -loss(hidden, weight, index)


def variants() -> Iterator[Callable[[], Any]]:
    """Calls which together launch every Triton kernel of the family as training does."""
    index, per_row = torch.zeros(64, dtype=torch.int64), torch.ones(64)
    for dtype in (torch.bfloat16, torch.float32):
        hidden = torch.zeros(64, 128, dtype=dtype, requires_grad=True)
        weight = torch.zeros(50_304, 128, dtype=dtype, requires_grad=True)
        for options in ({}, {"bias": torch.zeros(50_304, dtype=dtype), "softcap": 30.0}):
            yield partial(rlhf_kernels.linear_selective_log_softmax, hidden, weight, index, **options)
            yield partial(rlhf_kernels.linear_selective_log_softmax_and_entropy, hidden, weight, index, **options)
            yield partial(rlhf_kernels.linear_cross_entropy, hidden, weight, index, **options)
            for old, loss in (
                (per_row, {}),
                (per_row, {"dual_clip": 3.0}),
                (None, {"surrogate": "cispo"}),
                (per_row, {"ref_logprobs": per_row, "beta": 0.1, "entropy_coefficient": 0.01}),
            ):
                yield partial(
                    rlhf_kernels.linear_ppo_policy_loss, hidden, weight, index, old, per_row, None, **loss, **options
                )  # fmt: skip
