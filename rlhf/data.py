"""Turns records into token ids, in order. :mod:`rlhf.records` reads them, :mod:`rlhf.encoding` makes the ids of each.

All three kinds of record go through the same limits:

* a prompt longer than ``max_prompt_tokens`` is dropped, with a count (the paper drops prompts over 1k tokens);
* a completion ends with EOS, or as the chat template ends a turn, and has at most ``max_response_tokens`` tokens, the
  end included. A completion that this limit or the end of the context cuts off has no end token, since it did not end;
* a prompt that fills the context of the model is an error, unless a lower ``max_prompt_tokens`` drops it.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.batch import Group
from rlhf.encoding import encode, encode_records, eos_token_id, turn_end
from rlhf.records import (
    Comparison,
    Completion,
    DataError,
    Demonstration,
    Prompt,
    PromptRecord,
    field_error,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_texts,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How long things may be, in tokens."""

    max_prompt_tokens: int
    max_response_tokens: int
    context_length: int


@dataclass(frozen=True)
class Example:
    """A demonstration as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def group(self) -> Group:
        """The prompt and the completion as a batch takes them."""
        return Group(self.prompt_ids, [self.completion_ids])

    @property
    def idle(self) -> Example:
        """An example with nothing to learn, for a process that only takes part."""
        return Example(self.prompt_ids[:1], [])


@dataclass(frozen=True)
class RankedExample:
    """A comparison as token ids; 1 is the best rank."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    ranks: list[int]

    @property
    def group(self) -> Group:
        """The prompt and the completions as a batch takes them: all go through the model in one forward pass."""
        return Group(self.prompt_ids, self.completion_ids)

    @property
    def idle(self) -> RankedExample:
        """An example without a pair, for a process that only takes part."""
        return RankedExample(self.prompt_ids[:1], [self.completion_ids[0][:1]], [1])


@dataclass(frozen=True)
class PromptExample:
    """A prompt as token ids."""

    prompt_ids: list[int]
    text: Prompt
    """The prompt as its record has it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The record's further fields."""

    @property
    def group(self) -> Group:
        """The prompt, as yet without responses."""
        return Group(self.prompt_ids, [])


def tokenize_demonstrations(
    records: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[Example]:
    """The demonstrations within the limits, in order."""
    completions = [[record.completion] for record in records]
    kept = tokenize(records, completions, tokenizer, limits)
    return [Example(prompt_ids, completion_ids[0]) for _, prompt_ids, completion_ids in kept]


def tokenize_comparisons(
    records: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[RankedExample]:
    """The comparisons within the limits, in order."""
    completions = [list(record.completions) for record in records]
    kept = tokenize(records, completions, tokenizer, limits)
    differing = [each for each in kept if any(ids != each[2][0] for ids in each[2])]
    if not differing:
        raise DataError("no data is left to use: within the limits, the completions of a prompt are the same tokens")
    if len(differing) < len(kept):
        logger.warning(
            "dropped %d of %d comparisons: within the limits, their completions are the same tokens",
            len(kept) - len(differing), len(kept),
        )  # fmt: skip
    return [RankedExample(prompt_ids, ids, list(record.ranks)) for record, prompt_ids, ids in differing]


def tokenize_prompts(
    records: Sequence[PromptRecord], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[PromptExample]:
    """The prompts within the limits, in order, each with room in the context for a whole answer."""
    completions: list[list[Completion]] = [[] for _ in records]
    kept = tokenize(records, completions, tokenizer, limits)
    for record, prompt_ids, _ in kept:
        if len(prompt_ids) + limits.max_response_tokens > limits.context_length:
            raise field_error(
                record.where,
                record.fields[0],
                f"has {len(prompt_ids)} tokens, which with max_response_tokens = {limits.max_response_tokens} exceed "
                f"the model's context of {limits.context_length}; lower it, or max_prompt_tokens to drop such prompts",
            )
    return [PromptExample(prompt_ids, record.prompt, record.extra) for record, prompt_ids, _ in kept]


def tokenize_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int) -> Tensor:
    """Documents, each ended by EOS, joined and cut into chunks: ``(chunks, length)`` int64. The rest is dropped."""
    eos = eos_token_id(tokenizer)
    tokens = array("q")  # 8 bytes a token, where a list of Python integers takes 36
    for start in range(0, len(texts), 1000):
        for ids in encode(tokenizer, texts[start : start + 1000]):
            tokens.extend(ids)
            tokens.append(eos)
    chunks = len(tokens) // length
    if not chunks:
        raise DataError(f"pretraining text: has {len(tokens)} tokens, too few for one chunk of {length}")
    return torch.frombuffer(tokens, dtype=torch.int64)[: chunks * length].view(chunks, length)


def tokenize(
    records: Sequence[Any],
    completions: Sequence[Sequence[Completion]],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> list[tuple[Any, list[int], list[list[int]]]]:
    """The records within the limits, each with the ids of its prompt and of its completions."""
    kept, answers, cut = [], 0, 0
    encoded = encode_records(records, completions, tokenizer)
    for record, (prompt_ids, completion_ids) in zip(records, encoded, strict=True):
        if len(prompt_ids) > limits.max_prompt_tokens and limits.max_prompt_tokens < limits.context_length:
            continue
        room = min(limits.max_response_tokens, limits.context_length - len(prompt_ids))
        if room <= 0:
            raise field_error(
                record.where,
                record.fields[0],
                f"has {len(prompt_ids)} tokens, which leaves no room for a completion in the model's context of "
                f"{limits.context_length}; a lower max_prompt_tokens drops such prompts",
            )
        for name, ids in zip(record.fields[1:], completion_ids, strict=True):
            if not ids:
                raise field_error(record.where, name, "the tokenizer makes no token of it")
        kept.append((record, prompt_ids, [ids[:room] for ids in completion_ids]))
        answers += len(completion_ids)
        cut += sum(len(ids) > room for ids in completion_ids)
    dropped = f"dropped {len(records) - len(kept)} of {len(records)} prompts: over {limits.max_prompt_tokens} tokens"
    if not kept:
        raise DataError(f"no data is left to use: {dropped}" if records else "there are no records to use")
    if len(kept) < len(records):
        logger.warning(dropped)
    if cut:
        logger.warning("cut %d of %d completions: over %d tokens, or over the model's context of %d with their prompt",
                       cut, answers, limits.max_response_tokens, limits.context_length)  # fmt: skip
    return kept


__all__ = [
    "Comparison",
    "DataError",
    "Demonstration",
    "Example",
    "Limits",
    "PromptExample",
    "PromptRecord",
    "RankedExample",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "read_texts",
    "tokenize_comparisons",
    "tokenize_demonstrations",
    "tokenize_prompts",
    "tokenize_texts",
    "turn_end",
]
