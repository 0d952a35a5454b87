"""Batches with little padding: sequences laid end to end in rows of one length.

A row holds several sequences. Positions restart at 0 with every sequence, which is how transformers tells them
apart: its SDPA mask and its flash-attn call both keep a token from seeing the sequence before its own. The
losses read flat tensors with one entry per response token, in the order of the sequences, so no later code needs
a mask.

Some models do not keep the sequences of a row apart: a recurrent model carries its state from one sequence into the
next, and some attention takes no position ids. With such a model each sequence gets a padded row of its own
(:mod:`rlhf.probe` finds out which models need that).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from rlhf_kernels import pack_sequences

Layout: TypeAlias = Literal["packed", "one_row", "padded"]
"""``packed``: several sequences in a row; ``one_row``: all sequences in a single row, in which flash-attn finds their
boundaries; ``padded``: one sequence in a row, padded on the right."""


class Group(NamedTuple):
    """A prompt and its responses, as token ids. A group always goes through the model in one forward pass."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence: those of the prompt and of one response."""
        return [len(self.prompt) + len(response) for response in self.responses]


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
    """(R, C) int64, 0 at padding. None unless the layout is ``padded``."""
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
    """Lays out ``prompt + response`` for every response.

    Rows are as long as the longest sequence (``one_row``: as all sequences together). Best-fit-decreasing packing
    leaves little unused at that length, and the attention mask stays small.
    """
    sequences = [(group.prompt, response) for group in groups for response in group.responses]
    lengths = [length for group in groups for length in group.lengths]
    capacity = sum(lengths) if layout == "one_row" else max(lengths)
    rows = [[i] for i in range(len(lengths))] if layout == "padded" else pack_sequences(lengths, capacity)
    input_ids = torch.zeros(len(rows), capacity, dtype=torch.long)
    # The unused end of a row also counts from 0. To the model it is one more sequence, which nothing reads.
    position_ids = torch.zeros(len(rows), capacity, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), capacity, dtype=torch.long)
    start = [0] * len(lengths)
    for row, members in enumerate(rows):
        column = 0
        for sequence in members:
            end = column + lengths[sequence]
            prompt, response = sequences[sequence]
            input_ids[row, column:end] = torch.tensor([*prompt, *response])
            position_ids[row, column:end] = torch.arange(lengths[sequence])
            start[sequence] = row * capacity + column
            column = end
        position_ids[row, column:] = torch.arange(capacity - column)
        attention_mask[row, :column] = 1

    before = [
        torch.arange(begin + len(prompt) - 1, begin + length - 1)
        for begin, (prompt, _), length in zip(start, sequences, lengths, strict=True)
    ]
    return Batch(
        input_ids=input_ids,
        position_ids=None if layout == "padded" else position_ids,
        attention_mask=attention_mask if layout == "padded" else None,
        before=torch.cat(before),
        targets=torch.tensor([token for _, response in sequences for token in response], dtype=torch.long),
        last=torch.tensor([begin + length - 1 for begin, length in zip(start, lengths, strict=True)]),
        lengths=torch.tensor([len(response) for _, response in sequences]),
    )


def split(groups: Sequence[Group], tokens: int, layout: Layout = "packed") -> Iterator[list[int]]:
    """Splits a batch into parts for one forward pass each: indices of groups that take at most ``tokens`` positions.

    Groups keep their order. A group that is larger than ``tokens`` by itself is a part of its own.
    """
    part: list[int] = []
    rows = longest = size = 0
    for index, lengths in enumerate(group.lengths for group in groups):
        padded = (rows + len(lengths)) * max(longest, *lengths)
        if part and (padded if layout == "padded" else size + sum(lengths)) > tokens:
            yield part
            part = []
            rows = longest = size = 0
        part.append(index)
        rows, longest, size = rows + len(lengths), max(longest, *lengths), size + sum(lengths)
    if part:
        yield part
