"""Log-probs where every process of a group holds a part of the vocabulary, as tensor-parallel models do.

Each process runs the same kernels on its part. What they keep of a row (its maximum, sum, log-prob and entropy, four
numbers) goes to all processes in one collective, and from it each has the statistics of the whole row. The backward
kernels take those as they take their own, so that each writes the gradient of its part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.log_prob import gradient_of_logits, read_rows
from rlhf_kernels.registration import differentiated_once, run_kernel

ELSEWHERE = -1
"""The token of a row, for the backward kernels, whose part of the vocabulary does not have it."""


class Part(NamedTuple):
    """The tokens [first, first + own) of ``size``, which this process holds."""

    group: Any
    first: int
    own: int
    size: int


def check_backend(backend: str, dtype: torch.dtype) -> None:
    """Checks that a backend is one with kernels.

    Raises:
        RuntimeError: it is the reference.
    """
    if backend == "reference":
        why = (
            "float64 has no kernels" if dtype == torch.float64 else "the reference can't do with a part of a vocabulary"
        )
        raise RuntimeError(f"group: needs a backend with kernels; {why}")


def part_of_dtensor(group: Any, weight: Any, bias: Any) -> tuple[Part, Tensor, Tensor | None]:
    """The part of a process of a weight that is a DTensor split over its rows, with it and its part of the bias.

    FSDP splits weights in this way too, over processes that have different tokens. So a DTensor alone does not say that
    they share their tokens: the caller does, by ``group``.

    Raises:
        TypeError: it is split in another way, or over other processes than ``group``.
        ValueError: a process has no part of it, or the bias is not one entry per row.
    """
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise TypeError(
            f"weight: is a DTensor with placements {placements} on a mesh of {mesh.ndim} dimension(s), must be split "
            "over the vocabulary alone, Shard(0)"
        )
    if dist.get_process_group_ranks(mesh.get_group()) != dist.get_process_group_ranks(group):
        raise TypeError("weight: is a DTensor over other processes than those of group")
    size, each = weight.shape[0], -(-weight.shape[0] // mesh.size())
    if each * (mesh.size() - 1) >= size:
        raise ValueError(f"weight: has {size} rows, too few for a part of them in each of {mesh.size()} processes")
    first = mesh.get_local_rank() * each
    part = Part(group, first, min(each, size - first), size)
    if bias is not None:
        if bias.shape != (size,):
            raise ValueError(f"bias: has shape {tuple(bias.shape)}, must be ({size},), one entry per row of weight")
        if type(bias).__name__ == "DTensor":
            bias = bias.full_tensor() if not bias.placements[0].is_shard(0) else bias.to_local()
        if bias.shape[0] == size:
            bias = bias[first : first + part.own]
    return part, weight.to_local(), bias


# Dynamo can't trace the collectives, and there is nothing around the kernels to fuse with.
@torch.compiler.disable
def log_probs(
    logits: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int, group: Any, backend: str, temperature: float,
    inplace_backward: bool, *, with_entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probs and entropies (empty if not asked for) from a part of the logits."""
    check_backend(backend, logits.dtype)
    part = _equal_part(group, logits.shape[-1])
    index, wanted = _read(index, mask, ignore_index, part, part.own)
    return _LogProbs.apply(logits, index, wanted, part, backend, temperature, inplace_backward, with_entropy)


@torch.compiler.disable
def linear_log_probs(
    hidden: Tensor, weight: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int, bias: Tensor | None,
    group: Any, part: Part | None, backend: str, temperature: float, softcap: float | None, *, with_entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probs and entropies (empty if not asked for) from hidden states and a part of the output projection."""
    check_backend(backend, torch.promote_types(hidden.dtype, weight.dtype))
    equal = 0 if part else weight.shape[0]
    part = part or _equal_part(group, weight.shape[0])
    index, wanted = _read(index, mask, ignore_index, part, equal)
    logprobs, entropies = _LinearLogProbs.apply(
        hidden, weight, bias, index.flatten(), wanted.flatten(), part, backend, temperature, softcap, with_entropy
    )
    return logprobs.view(index.shape), entropies.view(index.shape) if with_entropy else entropies


def _equal_part(group: Any, own: int) -> Part:
    """The part of a process where all have the same number of tokens, in the order of their ranks."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group: this process does not belong to it")
    return Part(group, rank * own, own, count * own)


def _read(index: Tensor, mask: Tensor | None, ignore_index: int, part: Part, own: int) -> tuple[Tensor, Tensor]:
    """The index, checked, and the rows that count, as bool. On the CPU all processes must have the same, as ``own``."""
    if index.is_cpu:
        places = torch.arange(1, index.numel() + 1)
        wanted = torch.ones_like(places) if mask is None else mask.detach().flatten().long()
        facts = torch.tensor([own, index.numel(), int((index.flatten() * places).sum()), int((wanted * places).sum())])
        of_all = [torch.empty_like(facts) for _ in range(dist.get_world_size(part.group))]
        dist.all_gather(of_all, facts, group=part.group)
        rank = dist.get_rank(part.group)
        for other, theirs in enumerate(of_all):
            if theirs[0] != own:
                raise ValueError(
                    f"group: process {rank} holds {own} tokens of the vocabulary and process {other} {int(theirs[0])}, "
                    "must be as many"
                )
            if not torch.equal(theirs, facts):
                raise ValueError(
                    f"index: processes {rank} and {other} of the group differ in index or mask, must have the same"
                )
    # By the Python checks: those of the CPU's ops know only the tokens that are here.
    index, mask = read_rows("triton", index, mask, ignore_index, part.size)
    return index, checks.counted(index, mask, ignore_index)


class _Row(NamedTuple):
    """What the whole rows have."""

    logprobs: Tensor
    entropies: Tensor
    maxima: Tensor
    log_sums: Tensor


def _whole(
    results: tuple[Tensor, ...], inside: Tensor, index: Tensor, wanted: Tensor, part: Part, temperature: float,
    with_entropy: bool,
) -> _Row:  # fmt: skip
    """What all processes' results for their parts come to."""
    logprobs, entropies, maxima, log_sums = results
    count = dist.get_world_size(part.group)
    # A chosen token among none but banned ones is banned too.
    chosen = torch.where(inside & (maxima != -torch.inf), logprobs, -torch.inf)
    own = torch.stack([maxima, log_sums, chosen, *([entropies] if with_entropy else [])])
    gathered = own.new_empty(count, *own.shape)
    dist.all_gather(list(gathered.unbind()), own, group=part.group)
    tops, sums, chosen, *inner = gathered.double().unbind(1)
    top = tops.amax(0)
    # log Σ e^((l − top)/τ) of each part; nothing of one whose tokens are all banned.
    parts = torch.where(tops == -torch.inf, -torch.inf, (tops - top) / temperature + sums)
    log_sum = torch.logsumexp(parts, 0)
    logprob = (chosen + parts).amax(0) - log_sum
    valid = (index >= 0) & (index < part.size)
    logprob = torch.where(wanted, torch.where(valid, logprob, torch.nan), 0.0)
    entropy = entropies
    if with_entropy:
        # H = Σ w·(H_part − log w), w the probability of a part.
        shares = parts - log_sum
        weight = shares.exp()
        entropy = torch.where(weight == 0, 0.0, weight * (inner[0] - shares)).sum(0)
        entropy = torch.where(wanted, entropy, 0.0).float()
    return _Row(logprob.float(), entropy, top.float(), log_sum.float())


def _forward(
    ctx: Any, run: Callable[[Tensor], tuple[Tensor, ...]], operands: tuple[Tensor | None, ...], index: Tensor,
    wanted: Tensor, part: Part, backend: str, temperature: float, with_entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs this part's kernel on the tokens within it, and saves what the backward kernel takes."""
    own = index - part.first
    inside = wanted & (own >= 0) & (own < part.own)
    row = _whole(run(torch.where(inside, own, 0)), inside, index, wanted, part, temperature, with_entropy)
    ctx.save_for_backward(
        *operands, torch.where(inside, own, ELSEWHERE), wanted, row.entropies, row.maxima, row.log_sums
    )
    ctx.backend, ctx.temperature, ctx.with_entropy = backend, temperature, with_entropy
    if not with_entropy:
        ctx.mark_non_differentiable(row.entropies)
    return row.logprobs, row.entropies


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, index: Tensor, wanted: Tensor, part: Part, backend: str, temperature: float,
        inplace: bool, with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.inplace = inplace

        def run(own: Tensor) -> Any:
            return run_kernel(
                backend, "selective_log_softmax", logits, own, wanted, None, temperature, with_entropy, False
            )  # fmt: skip

        return _forward(ctx, run, (logits,), index, wanted, part, backend, temperature, with_entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        logits, index, wanted, entropies, maxima, log_sums = saved
        of_logprobs, of_entropies = gradients
        arguments = (
            logits, index, wanted, None, ctx.temperature, entropies, maxima, log_sums, of_logprobs,
            of_entropies if ctx.with_entropy else None,
        )  # fmt: skip
        with torch.no_grad():
            of_logits = gradient_of_logits(ctx.backend, ctx.inplace, *arguments)
        results = of_logits, *[None] * 7
        return differentiated_once("selective_log_softmax", results, (*saved, *gradients))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, wanted: Tensor, part: Part,
        backend: str, temperature: float, softcap: float | None, with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.softcap, ctx.part = softcap, part

        def run(own: Tensor) -> Any:
            return run_kernel(
                backend, "linear_selective_log_softmax", hidden, weight, own, wanted, None, bias, temperature, softcap,
                with_entropy,
            )  # fmt: skip

        return _forward(ctx, run, (hidden, weight, bias), index, wanted, part, backend, temperature, with_entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        hidden, weight, bias, index, wanted, entropies, maxima, log_sums = saved
        of_logprobs, of_entropies = gradients
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        with torch.no_grad():
            of_hidden, of_weight, of_bias = run_kernel(
                ctx.backend, "linear_selective_log_softmax_backward", hidden, weight, index, wanted, None, bias,
                ctx.temperature, ctx.softcap, entropies, maxima, log_sums, of_logprobs,
                of_entropies if ctx.with_entropy else None, needs_hidden, needs_weight,
            )  # fmt: skip
            if needs_hidden:  # every part of the vocabulary adds to it
                total = of_hidden.float()
                dist.all_reduce(total, group=ctx.part.group)
                of_hidden = total.to(hidden.dtype)
        found = zip(ctx.needs_input_grad, (of_hidden, of_weight, of_bias), strict=False)
        results = (*(x if needed else None for needed, x in found), *[None] * 7)
        return differentiated_once("linear_selective_log_softmax", results, (*saved, *gradients))
