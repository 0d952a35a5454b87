"""From records to token ids. The paper's limits (appendix C): prompts over 1k tokens are dropped, answers capped at 1k.

Prompt and completion are tokenized apart and then joined, because the policy will see exactly these prompt tokens when
it writes its own completion. A completion ends with the end-of-sequence token, unless the cap cut it off: then it did
not end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.records import (
    Comparison,
    DataError,
    Demonstration,
    Message,
    Prompt,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_texts,
)

logger = logging.getLogger(__name__)
Kept = TypeVar("Kept", Demonstration, Comparison, Prompt)


@dataclass(frozen=True)
class Limits:
    """How long things may be, in tokens."""

    max_prompt_tokens: int
    max_response_tokens: int
    context_length: int


@dataclass(frozen=True)
class Example:
    """A demonstration, or a chunk of pretraining text with its first token as the prompt."""

    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True)
class RankedExample:
    """A comparison: K completions of one prompt."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    ranks: list[int]


@dataclass(frozen=True)
class PromptExample:
    """A prompt, and its text as a judge would read it."""

    prompt_ids: list[int]
    text: str


def tokenize_demonstrations(
    records: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[Example]:
    """Demonstrations whose prompt is not over the limit.

    Raises:
        DataError: a prompt does not fit the model's context, or none is left.
    """
    kept = _prompts(records, tokenizer, limits)
    completions = _encode(tokenizer, [record.completion for record, _ in kept])
    return [
        Example(prompt, _completion(ids, prompt, tokenizer, limits, record.where, "completion"))
        for (record, prompt), ids in zip(kept, completions, strict=True)
    ]


def tokenize_comparisons(
    records: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[RankedExample]:
    """Comparisons whose prompt is not over the limit.

    Raises:
        DataError: a prompt does not fit the model's context, or none is left.
    """
    kept = _prompts(records, tokenizer, limits)
    ids = iter(_encode(tokenizer, [completion for record, _ in kept for completion in record.completions]))
    return [
        RankedExample(
            prompt,
            [
                _completion(next(ids), prompt, tokenizer, limits, record.where, f"completions[{i}]")
                for i in range(len(record.completions))
            ],
            list(record.ranks),
        )
        for record, prompt in kept
    ]


def tokenize_prompts(
    records: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[PromptExample]:
    """Prompts that are not over the limit and leave room for a whole answer in the context.

    Raises:
        DataError: a prompt and its answer do not fit the model's context, or none is left.
    """
    examples = []
    for record, ids in _prompts(records, tokenizer, limits):
        if len(ids) + limits.max_response_tokens > limits.context_length:
            raise DataError(
                f"{record.where}: field 'prompt': has {len(ids)} tokens, which with {limits.max_response_tokens} of an answer "
                f"exceed the model's context of {limits.context_length}; lower lengths.max_response_tokens, or "
                "lengths.max_prompt_tokens to drop such prompts"
            )
        text = record.prompt if isinstance(record.prompt, str) else _chat(tokenizer, record.prompt, record.where)
        examples.append(PromptExample(ids, text))
    return examples


def tokenize_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int) -> Tensor:
    """(chunks, length) int64: the documents one after another, each ended by EOS, cut into chunks; the rest is dropped.

    Raises:
        DataError: there is too little text for one chunk.
    """
    ids = [token for document in _encode(tokenizer, texts) for token in (*document, tokenizer.eos_token_id)]
    chunks = len(ids) // length
    if not chunks:
        raise DataError(f"pretraining data: has {len(ids)} tokens in all, too few for one chunk of {length}")
    return torch.tensor(ids[: chunks * length]).view(chunks, length)


def _prompts(
    records: Sequence[Kept], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[tuple[Kept, list[int]]]:
    """The records whose prompt is short enough, with its tokens."""
    texts = [
        record.prompt if isinstance(record.prompt, str) else _chat(tokenizer, record.prompt, record.where)
        for record in records
    ]
    # A chat template writes its own special tokens; plain text gets the tokenizer's, without an end, as it goes on.
    plain = [isinstance(record.prompt, str) for record in records]
    special = _encode(tokenizer, texts, add_special_tokens=True) if any(plain) else [[] for _ in records]
    bare = _encode(tokenizer, texts) if not all(plain) else special
    kept = []
    for record, is_plain, with_special, without in zip(records, plain, special, bare, strict=True):
        ids = with_special if is_plain else without
        if is_plain and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        ids = ids or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
        if len(ids) >= limits.context_length:
            raise DataError(
                f"{record.where}: field 'prompt': has {len(ids)} tokens, but the model's context is {limits.context_length}"
            )
        if len(ids) <= limits.max_prompt_tokens:
            kept.append((record, ids))
    if len(kept) < len(records):
        dropped = len(records) - len(kept)
        logger.info("dropped %d of %d prompts: over %d tokens", dropped, len(records), limits.max_prompt_tokens)
    if not kept:
        raise DataError(f"{records[0].where}: this prompt and all others are over lengths.max_prompt_tokens ({limits.max_prompt_tokens})")
    return kept


def _completion(
    ids: list[int], prompt: list[int], tokenizer: PreTrainedTokenizerBase, limits: Limits, where: str, field: str
) -> list[int]:
    """A completion's tokens, ended or cut off."""
    if not ids:
        raise DataError(f"{where}: field {field!r}: has no tokens")
    return [*ids, tokenizer.eos_token_id][: min(limits.max_response_tokens, limits.context_length - len(prompt))]


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of many texts at once. Long ones are our business, so the tokenizer is not to warn of them."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False).input_ids


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str) -> str:
    """A conversation as the model's chat template writes it, up to where the assistant speaks."""
    if not tokenizer.chat_template:
        raise DataError(f"{where}: is a conversation, but the tokenizer has no chat template; give text prompts instead")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


__all__ = [
    "DataError",
    "Example",
    "Limits",
    "PromptExample",
    "RankedExample",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "read_texts",
    "tokenize_comparisons",
    "tokenize_demonstrations",
    "tokenize_prompts",
    "tokenize_texts",
]
