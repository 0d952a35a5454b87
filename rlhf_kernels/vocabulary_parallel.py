"""Log-probs where every process of a group holds a part of the vocabulary, as tensor-parallel models do.

Each process runs the same kernels on its part. What they keep of a row (its maximum, sum, log-prob and entropy, four
numbers) goes to all processes in one collective, and from it each has the statistics of the whole row. The backward
kernels take those as they take their own, so that each writes the gradient of its part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels.log_prob import read_rows
from rlhf_kernels.registration import run_kernel

ELSEWHERE = -1
"""The token of a row, for the backward kernels, whose part of the vocabulary does not have it."""


class Part(NamedTuple):
    """The tokens [first, first + own) of ``size``, which this process holds."""

    group: Any
    first: int
    own: int
    size: int


def part_of(group: Any, own: int, index: Tensor) -> Part:
    """The part of a process when all have the same number of tokens, in the order of their ranks.

    Raises:
        ValueError: on the CPU, where the processes' parts or their tokens differ.
    """
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group: this process does not belong to it")
    if index.is_cpu:
        facts = torch.tensor([own, index.numel(), int(index.sum())])
        of_all = [torch.empty_like(facts) for _ in range(count)]
        dist.all_gather(of_all, facts, group=group)
        for other, theirs in enumerate(of_all):
            if theirs[0] != own:
                raise ValueError(
                    f"group: process {rank} holds {own} tokens of the vocabulary and process {other} {int(theirs[0])}, "
                    "must be as many"
                )
            if not torch.equal(theirs, facts):
                raise ValueError(
                    f"index: processes {rank} and {other} of the group have different ones, must be the same"
                )
    return Part(group, rank * own, own, count * own)


def part_of_dtensor(group: Any, weight: Any, bias: Any) -> tuple[Part, Tensor, Tensor | None]:
    """The part of a process of a weight that is a DTensor split over its rows, with it and its part of the bias.

    FSDP splits weights in this way too, over processes that have different tokens. So a DTensor alone does not say that
    they share their tokens: the caller does, by ``group``.

    Raises:
        TypeError: it is split in another way, or over other processes than ``group``.
    """
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise TypeError(
            f"weight: is a DTensor with placements {placements} on a mesh of {mesh.ndim} dimension(s), must be split "
            "over the vocabulary alone, Shard(0)"
        )
    if dist.get_process_group_ranks(mesh.get_group()) != dist.get_process_group_ranks(group):
        raise TypeError("weight: is a DTensor over other processes than those of group")
    each = -(-weight.shape[0] // mesh.size())
    first = min(weight.shape[0], mesh.get_local_rank() * each)
    part = Part(group, first, min(each, weight.shape[0] - first), weight.shape[0])
    if bias is not None:
        bias = bias.to_local() if type(bias).__name__ == "DTensor" else bias[first : first + part.own]
    return part, weight.to_local(), bias


@torch.compiler.disable  # a collective between two ops; the ops are kernels anyway
def log_probs(
    logits: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int, part: Part, backend: str, temperature: float,
    inplace_backward: bool, *, with_entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probs and entropies (empty if not asked for) from a part of the logits."""
    index, wanted = _read(index, mask, ignore_index, part)
    return _LogProbs.apply(logits, index, wanted, part, backend, temperature, inplace_backward, with_entropy)


@torch.compiler.disable
def linear_log_probs(
    hidden: Tensor, weight: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int, bias: Tensor | None,
    part: Part, backend: str, temperature: float, softcap: float | None, *, with_entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probs and entropies (empty if not asked for) from hidden states and a part of the output projection."""
    index, wanted = _read(index, mask, ignore_index, part)
    logprobs, entropies = _LinearLogProbs.apply(
        hidden, weight, bias, index.flatten(), wanted.flatten(), part, backend, temperature, softcap, with_entropy
    )
    return logprobs.view(index.shape), entropies.view(index.shape) if with_entropy else entropies


def check_backend(backend: str) -> None:
    """Checks that a backend is one with kernels.

    Raises:
        RuntimeError: it is the reference.
    """
    if backend == "reference":
        raise RuntimeError("group: the reference has no part of a vocabulary, and float64 has no other backend")


def _read(index: Tensor, mask: Tensor | None, ignore_index: int, part: Part) -> tuple[Tensor, Tensor]:
    """The index, checked, and the rows that count, as bool."""
    return read_rows("triton", index, mask, ignore_index, part.size)  # the CPU's ops would check a part's index


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
    own = torch.stack(
        [maxima, log_sums, torch.where(inside, logprobs, -torch.inf), entropies if with_entropy else maxima]
    )
    gathered = own.new_empty(count, *own.shape)
    dist.all_gather(list(gathered.unbind()), own, group=part.group)
    tops, sums, chosen, inner = gathered.double().unbind(1)
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
        entropy = torch.where(weight == 0, 0.0, weight * (inner - shares)).sum(0)
        entropy = torch.where(wanted, entropy, 0.0).float()
    return _Row(logprob.float(), entropy, top.float(), log_sum.float())


def _local(index: Tensor, wanted: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """The index within this part, and where it is in it."""
    own = index - part.first
    return own, wanted & (own >= 0) & (own < part.own)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, index: Tensor, wanted: Tensor, part: Part, backend: str, temperature: float,
        inplace: bool, with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        own, inside = _local(index, wanted, part)
        results = run_kernel(
            backend,
            "selective_log_softmax",
            logits,
            torch.where(inside, own, 0),
            wanted,
            temperature,
            with_entropy,
            False,
        )
        row = _whole(results, inside, index, wanted, part, temperature, with_entropy)
        ctx.save_for_backward(
            logits, torch.where(inside, own, ELSEWHERE), wanted, row.entropies, row.maxima, row.log_sums
        )
        ctx.backend, ctx.temperature, ctx.inplace, ctx.with_entropy = backend, temperature, inplace, with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(row.entropies)
        return row.logprobs, row.entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        logits, index, wanted, entropies, maxima, log_sums = ctx.saved_tensors
        of_logprobs, of_entropies = gradients
        arguments = (
            logits, index, wanted, ctx.temperature, entropies, maxima, log_sums, of_logprobs,
            of_entropies if ctx.with_entropy else None,
        )  # fmt: skip
        if ctx.inplace:
            run_kernel(ctx.backend, "selective_log_softmax_backward_", *arguments)
            torch.autograd.graph.increment_version(logits)
            return logits.detach(), *[None] * 7
        return run_kernel(ctx.backend, "selective_log_softmax_backward", *arguments), *[None] * 7


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, wanted: Tensor, part: Part,
        backend: str, temperature: float, softcap: float | None, with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        own, inside = _local(index, wanted, part)
        results = run_kernel(
            backend, "linear_selective_log_softmax", hidden, weight, torch.where(inside, own, 0), wanted, bias,
            temperature, softcap, with_entropy,
        )  # fmt: skip
        row = _whole(results, inside, index, wanted, part, temperature, with_entropy)
        ctx.save_for_backward(
            hidden, weight, torch.where(inside, own, ELSEWHERE), wanted, bias, row.entropies, row.maxima, row.log_sums
        )
        ctx.backend, ctx.temperature, ctx.softcap, ctx.with_entropy = backend, temperature, softcap, with_entropy
        ctx.part = part
        if not with_entropy:
            ctx.mark_non_differentiable(row.entropies)
        return row.logprobs, row.entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        hidden, weight, index, wanted, bias, entropies, maxima, log_sums = ctx.saved_tensors
        of_logprobs, of_entropies = gradients
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        of_hidden, of_weight, of_bias = run_kernel(
            ctx.backend, "linear_selective_log_softmax_backward", hidden, weight, index, wanted, bias, ctx.temperature,
            ctx.softcap, entropies, maxima, log_sums, of_logprobs, of_entropies if ctx.with_entropy else None,
            needs_hidden, needs_weight,
        )  # fmt: skip
        if needs_hidden:  # every part of the vocabulary adds to it
            total = of_hidden.float()
            dist.all_reduce(total, group=ctx.part.group)
            of_hidden = total.to(hidden.dtype)
        return (
            of_hidden if needs_hidden else None,
            of_weight if ctx.needs_input_grad[1] else None,
            of_bias if ctx.needs_input_grad[2] else None,
            *[None] * 7,
        )
