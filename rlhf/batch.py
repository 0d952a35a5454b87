"""Batches with little padding: sequences laid end to end in rows of one length.

A row holds several sequences. Positions restart at 0 with every sequence, which is how transformers tells them
apart: its SDPA mask and its flash-attn call both keep a token from seeing the sequence before its own. The
losses read flat tensors with one entry per response token, in the order of the sequences, so no later code needs
a mask.

Where a prompt has several responses, it goes through the model once: they all follow it in one row, with positions that
go on from the prompt's end in each of them, and a mask of the whole row says who sees whom.

Some models do not keep the sequences of a row apart: a recurrent model carries its state from one sequence into the
next, and some attention takes no position ids. With such a model each sequence gets a padded row of its own
(:mod:`rlhf.probe` finds out which models need that).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from rlhf_kernels import pack_sequences

Layout: TypeAlias = Literal["packed", "one_row", "padded", "shared"]
"""``packed``: several sequences in a row; ``one_row``: all sequences in a single row, for attention that takes their
boundaries and no mask; ``padded``: one sequence in a row, padded on the right; ``shared``: as packed, but a prompt's
responses follow it in one row, and a mask lets each of them see the prompt and itself."""


class Group(NamedTuple):
    """A prompt and its responses, as token ids. A group always goes through the model in one forward pass."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]

    def units(self, layout: Layout) -> list[Group]:
        """What goes into one row: the whole group where a prompt is shared, else the prompt with one response each."""
        return [self] if layout == "shared" else [Group(self.prompt, [response]) for response in self.responses]

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.prompt) + sum(map(len, self.responses))


def groups_of_one(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Group]:
    """One response to each prompt."""
    return [Group(prompt, [response]) for prompt, response in zip(prompts, responses, strict=True)]


@dataclass(frozen=True)
class Batch:
    """``S`` sequences in ``R`` rows of ``C`` positions, with ``M`` response tokens in all."""

    input_ids: Tensor
    """(R, C) int64."""
    position_ids: Tensor | None
    """(R, C) int64, from 0 within each sequence. None if rows are padded, since positions are 0, 1, ... then."""
    attention_mask: Tensor | None
    """Where rows are padded, (R, C) int64, 0 at padding. Where prompts are shared, (R, 1, C, C) bool: which positions
    (the last dimension) each position sees. Else None."""
    before: Tensor
    """(M,) int64: the flat position just before each response token, whose hidden state predicts it."""
    targets: Tensor
    """(M,) int64: the response tokens, sequence after sequence."""
    last: Tensor
    """(S,) int64: the flat position of each sequence's last token, where a reward model reads its score."""
    lengths: Tensor
    """(S,) int64: how many response tokens each sequence has; sums to M."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device, non_blocking=True)
            for name, tensor in vars(self).items()
        }
        return Batch(**moved)


def lay_out(groups: Sequence[Group], layout: Layout = "packed") -> Batch:
    """Lays out ``prompt + response`` for every response; where prompts are shared, ``prompt + all responses``.

    Rows are as long as the longest of these (``one_row``: as all of them together). Best-fit-decreasing packing leaves
    little unused at that length, and the attention mask stays small.
    """
    units = [unit for group in groups for unit in group.units(layout)]
    lengths = [unit.length for unit in units]
    capacity = sum(lengths) if layout == "one_row" else max(lengths)
    rows = [[i] for i in range(len(units))] if layout == "padded" else pack_sequences(lengths, capacity)
    input_ids = torch.zeros(len(rows), capacity, dtype=torch.long)
    position_ids = torch.zeros(len(rows), capacity, dtype=torch.long)
    # For masks: the unit that a position belongs to, −1 for none, and the number of its response there, from 1.
    unit_at = torch.full((len(rows), capacity), -1)
    response_at = torch.zeros(len(rows), capacity, dtype=torch.long)
    start = [0] * len(units)
    for row, members in enumerate(rows):
        column = 0
        for number in members:
            unit, length = units[number], lengths[number]
            start[number] = row * capacity + column
            input_ids[row, column : column + length] = torch.tensor([*unit.prompt, *chain(*unit.responses)])
            unit_at[row, column : column + length] = number
            position_ids[row, column : column + len(unit.prompt)] = torch.arange(len(unit.prompt))
            column += len(unit.prompt)
            for i, response in enumerate(unit.responses, 1):
                end = column + len(response)
                position_ids[row, column:end] = torch.arange(len(unit.prompt), len(unit.prompt) + len(response))
                response_at[row, column:end] = i
                column = end
        # To the model the unused end of a row belongs to its last sequence, which sees nothing of what follows it. So
        # rows of one sequence each need no mask, and attention is twice as fast. Where prompts are shared there is a
        # mask, and a row may be longer than the model's context: there all of the end is at position 0.
        if layout != "shared":
            position_ids[row, column:] = position_ids[row, column - 1] + 1 + torch.arange(capacity - column)

    before: list[int] = []
    last: list[int] = []
    for begin, unit in zip(start, units, strict=True):
        end_of_prompt = at = begin + len(unit.prompt)
        for response in unit.responses:
            places = [end_of_prompt - 1, *range(at, at + len(response))]
            before += places[:-1]
            last.append(places[-1])
            at += len(response)
    responses = [response for unit in units for response in unit.responses]
    attention_mask = None
    if layout == "padded":
        attention_mask = (unit_at >= 0).long()
    elif layout == "shared":
        attention_mask = _mask_of_shared_prompts(unit_at, response_at)
    return Batch(
        input_ids=input_ids,
        position_ids=None if layout == "padded" else position_ids,
        attention_mask=attention_mask,
        before=torch.tensor(before, dtype=torch.long),
        targets=torch.tensor([token for response in responses for token in response], dtype=torch.long),
        last=torch.tensor(last),
        lengths=torch.tensor([len(response) for response in responses]),
    )


def _mask_of_shared_prompts(unit_at: Tensor, response_at: Tensor) -> Tensor:
    """(R, 1, C, C) bool: a position sees itself and what comes before it of its prompt and of its own response."""
    places = torch.arange(unit_at.shape[1])
    same_unit = unit_at[:, :, None] == unit_at[:, None, :]
    of_prompt = response_at[:, None, :] == 0
    same_response = response_at[:, :, None] == response_at[:, None, :]
    return (same_unit & (of_prompt | same_response) & (places <= places[:, None]))[:, None]


def split(groups: Sequence[Group], tokens: int, layout: Layout = "packed") -> Iterator[list[int]]:
    """Splits a batch into parts for one forward pass each: indices of groups that take at most ``tokens`` positions.

    Groups keep their order. A group that is larger than ``tokens`` by itself is a part of its own.
    """
    part: list[int] = []
    rows = longest = size = 0
    for index, lengths in enumerate([unit.length for unit in group.units(layout)] for group in groups):
        padded = (rows + len(lengths)) * max(longest, *lengths)
        if part and (padded if layout == "padded" else size + sum(lengths)) > tokens:
            yield part
            part = []
            rows = longest = size = 0
        part.append(index)
        rows, longest, size = rows + len(lengths), max(longest, *lengths), size + sum(lengths)
    if part:
        yield part
