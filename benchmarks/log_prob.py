"""Log-probs, and entropies, of sampled tokens from logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bounds
import torch
from bounds import Work
from cases import BACKWARD, FORWARD, OURS, Case, Implementation, Inputs, eager, ours
from torch import Tensor

import rlhf_kernels

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}

# Rows, and the vocabulary of GPT-2 or Llama 3.
SIZES = {
    "cpu": ((512, 50_257), (512, 128_256)),
    "cuda": ((8192, 128_256),),
    "quick": ((32, 50_257),),
}
TAKES = ("logits", "index")
# Trainers have logits of several sequences. TRL and verl loop over these where they have no kernel.
SEQUENCES = 8


def cases(scale: str) -> list[Case]:
    """Both ops at each size."""
    steps = (FORWARD, BACKWARD) if scale != "quick" else (BACKWARD,)
    return [case for rows, size in SIZES[scale] for case in (_log_probs(rows, size, steps), _entropies(rows, size))]


def _log_probs(rows: int, size: int, steps: tuple[str, ...]) -> Case:
    op = rlhf_kernels.selective_log_softmax
    return _case(
        op,
        rows,
        size,
        steps,
        ours(op),
        _in_place(op),
        Implementation("bare read of the logits", _bare_read, ("logits",), steps=(FORWARD,), compared=False),
        eager(log_probs),
        Implementation("TRL", _trl_log_probs, install="trl"),
        Implementation("verl", _verl_log_probs, install="verl", overwrites="logits"),
        Implementation("Liger", _liger_log_probs, install="liger-kernel", devices=("cuda",), steps=(FORWARD,)),
        Implementation(
            "Liger cross-entropy", _liger_cross_entropy, install="liger-kernel", devices=("cuda",),
            overwrites="logits", steps=(BACKWARD,),
        ),
        Implementation("flash-attn", partial(_flash_attention, inplace=False), install="flash-attn", devices=("cuda",)),
        Implementation(
            "flash-attn in place", partial(_flash_attention, inplace=True), install="flash-attn", devices=("cuda",),
            overwrites="logits", steps=(BACKWARD,),
        ),
    )  # fmt: skip


def _entropies(rows: int, size: int) -> Case:
    op = rlhf_kernels.selective_log_softmax_and_entropy
    return _case(
        op,
        rows,
        size,
        (BACKWARD,),
        ours(op),
        _in_place(op),
        eager(log_probs_and_entropy),
        Implementation("TRL", _trl_entropies, install="trl"),
        Implementation("verl", _verl_entropies, install="verl"),
    )


def _case(op: Callable[..., Any], rows: int, size: int, steps: tuple[str, ...], *compared: Implementation) -> Case:
    return Case(
        op.__name__,
        f"N={rows} V={size}",
        partial(inputs, rows, size),
        TAKES,
        op,
        compared,
        work,
        gradients=("logits",),
        steps=steps,
        rows=TAKES,
        chunk=32,
        sample=64,
        adversarial=_adversarial,
    )


def _in_place(op: Callable[..., Any]) -> Implementation:
    name = f"{OURS} in place"
    return Implementation(name, lambda: partial(op, inplace_backward=True), overwrites="logits", steps=(BACKWARD,))


def inputs(rows: int, size: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """Logits and a token in each row."""
    device = generator.device
    logits = torch.randn(rows, size, generator=generator, device=device).mul_(4).to(dtype)
    return {"logits": logits, "index": torch.randint(size, (rows,), generator=generator, device=device)}


def _adversarial(inputs: Inputs) -> Inputs:
    """Three kinds of rows in turn: logits of ±1e4, one huge logit, and half of the tokens banned."""
    logits = inputs["logits"].clone()
    logits[0::3] = torch.where(logits[0::3] > 0, 1e4, -1e4).to(logits.dtype)
    logits[1::3, 7] = 1e4
    logits[2::3, 0::2] = -torch.inf
    index = inputs["index"].clone()
    index[2::3] |= 1  # a sampled token is not a banned one
    return {"logits": logits, "index": index.clamp(max=logits.shape[1] - 1)}


def work(inputs: Inputs, step: str) -> Work:
    """The logits are read; for the gradient they are read again, and as much is written."""
    size = inputs["logits"].nbytes
    return Work(read=size) if step == FORWARD else Work(read=2 * size, written=size)


def log_probs(logits: Tensor, index: Tensor) -> Tensor:
    """Log-softmax of all logits, of which one per row is taken."""
    return logits.float().log_softmax(-1).gather(-1, index[..., None]).squeeze(-1)


def log_probs_and_entropy(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The same log-softmax, used twice."""
    every = logits.float().log_softmax(-1)
    return every.gather(-1, index[..., None]).squeeze(-1), -(every.exp() * every).sum(-1)


def _bare_read() -> Callable[[Tensor], Tensor]:
    return bounds.bare_read


def _by_sequence(function: Callable[..., Any]) -> Callable[[Tensor, Tensor], Any]:
    """The rows as those of several sequences, as a trainer has them."""

    def call(logits: Tensor, index: Tensor) -> Any:
        found = function(logits.view(SEQUENCES, -1, logits.shape[-1]), index.view(SEQUENCES, -1))
        return found.flatten() if isinstance(found, Tensor) else tuple(x.flatten() for x in found)

    return call


def _trl_log_probs() -> Callable[..., Tensor]:
    from trl.trainer.utils import selective_log_softmax

    return _by_sequence(selective_log_softmax)


def _trl_entropies() -> Callable[..., tuple[Tensor, Tensor]]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return _by_sequence(selective_log_softmax_and_entropy)


def _verl_log_probs() -> Callable[..., Tensor]:
    """On a GPU flash-attn's kernel in place, where that is installed."""
    from verl.utils.torch_functional import logprobs_from_logits

    return _by_sequence(logprobs_from_logits)


def _verl_entropies() -> Callable[..., tuple[Tensor, Tensor]]:
    """Its actor's steps: the entropy is compiled, and needs the logits that the log-probs would overwrite."""
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    entropies = torch.compile(entropy_from_logits, dynamic=True)
    return _by_sequence(lambda logits, index: (logprobs_from_logits(logits, index, False), entropies(logits)))


def _liger_log_probs() -> Callable[[Tensor, Tensor], Tensor]:
    """Its kernel leaves out the last row of each sequence: here of one that has all rows."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return lambda logits, index: fused_selective_log_softmax(logits[None], index[None, :-1], 1.0).squeeze(0)


def _liger_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    """Its forward pass writes a gradient over the logits, and its backward pass multiplies that into a new tensor."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, index: -liger_cross_entropy(logits, index, reduction="none")


def _flash_attention(*, inplace: bool) -> Callable[[Tensor, Tensor], Tensor]:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, index: -cross_entropy_loss(logits, index, inplace_backward=inplace)[0]


def variants() -> Iterator[Callable[[], Any]]:
    """Calls which together launch every Triton kernel of the family as training does."""
    index = torch.zeros(64, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.zeros(64, 50_304, dtype=dtype, requires_grad=True)
        for op in (rlhf_kernels.selective_log_softmax, rlhf_kernels.selective_log_softmax_and_entropy):
            for inplace in (False, True):
                yield lambda op=op, x=logits, inplace=inplace: op(x * 1, index, inplace_backward=inplace)
