"""Batches without padding: sequences laid end to end in rows of one length.

A row holds several sequences. Positions restart at 0 with every sequence, which is how transformers tells them
apart: its SDPA mask and its flash-attn call both keep a token from seeing the sequence before its own. What a
loss needs of a batch is flat as well: one entry per response token, in the order of the sequences, so there is
nothing to mask anywhere downstream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels import pack_sequences


@dataclass(frozen=True)
class Batch:
    """``S`` sequences in ``R`` rows of ``C`` positions, with ``M`` response tokens in all."""

    input_ids: Tensor
    """(R, C) int64."""
    position_ids: Tensor
    """(R, C) int64, from 0 within each sequence."""
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
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    @property
    def cu_seqlens(self) -> Tensor:
        """(S+1,) int64: where each sequence's response tokens begin and end among the M."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))


def lay_out(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, one_row: bool = False) -> Batch:
    """Packs ``prompt + response`` for every pair, in rows as long as the longest of them.

    Rows that long waste little (best-fit-decreasing packing) and keep the attention mask small. flash-attn takes
    its sequence boundaries from a single row instead: ``one_row``.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    capacity = sum(lengths) if one_row else max(lengths)
    rows = pack_sequences(lengths, capacity)
    input_ids = torch.zeros(len(rows), capacity, dtype=torch.long)
    # Unused tail positions count on from 0 as well: a sequence of their own that nothing looks at.
    position_ids = torch.zeros(len(rows), capacity, dtype=torch.long)
    start = [0] * len(lengths)
    for row, members in enumerate(rows):
        column = 0
        for sequence in members:
            end = column + lengths[sequence]
            input_ids[row, column:end] = torch.tensor([*prompts[sequence], *responses[sequence]])
            position_ids[row, column:end] = torch.arange(lengths[sequence])
            start[sequence] = row * capacity + column
            column = end
        position_ids[row, column:] = torch.arange(capacity - column)

    before = [
        torch.arange(begin + len(prompt) - 1, begin + length - 1)
        for begin, prompt, length in zip(start, prompts, lengths, strict=True)
    ]
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        before=torch.cat(before),
        targets=torch.tensor([token for response in responses for token in response], dtype=torch.long),
        last=torch.tensor([begin + length - 1 for begin, length in zip(start, lengths, strict=True)]),
        lengths=torch.tensor([len(response) for response in responses]),
    )


def split(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Parts of a batch small enough for one forward pass: indices whose sequences hold ``tokens`` tokens at most.

    Sequences keep their order. One that is longer than ``tokens`` by itself is a part of its own.
    """
    part: list[int] = []
    size = 0
    for index, length in enumerate(lengths):
        if part and size + length > tokens:
            yield part
            part, size = [], 0
        part.append(index)
        size += length
    if part:
        yield part
