"""Records as token ids, and the order in which training visits them. :mod:`rlhf.records` reads the files.

Prompt and completion are tokenized separately and concatenated: at rollout the policy sees exactly the prompt tokens
it was fine-tuned on. All three kinds of record go through the same limits:

* a prompt longer than ``max_prompt_tokens`` is dropped, with a count (the paper drops prompts over 1k tokens);
* a completion ends with EOS and has at most ``max_response_tokens`` tokens, that one included. One that is cut off, by
  this limit or by the end of the context, gets no EOS: it did not end;
* a prompt that fills the context of the model is an error, unless ``max_prompt_tokens`` says to drop its like.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.records import (
    Comparison,
    DataError,
    Demonstration,
    Prompt,
    PromptRecord,
    field_error,
    first_line,
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


@dataclass(frozen=True)
class RankedExample:
    """A comparison as token ids; 1 is the best rank."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    ranks: list[int]


@dataclass(frozen=True)
class PromptExample:
    """A prompt as token ids."""

    prompt_ids: list[int]
    text: Prompt
    """The prompt as its record has it."""


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
    completions = [record.completions for record in records]
    kept = tokenize(records, completions, tokenizer, limits)
    return [RankedExample(prompt_ids, ids, list(record.ranks)) for record, prompt_ids, ids in kept]


def tokenize_prompts(
    records: Sequence[PromptRecord], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[PromptExample]:
    """The prompts within the limits, in order, each with room in the context for a whole answer."""
    completions: list[list[str]] = [[] for _ in records]
    kept = tokenize(records, completions, tokenizer, limits)
    for record, prompt_ids, _ in kept:
        if len(prompt_ids) + limits.max_response_tokens > limits.context_length:
            raise field_error(
                record.where,
                record.fields[0],
                f"has {len(prompt_ids)} tokens, which with max_response_tokens = {limits.max_response_tokens} exceed "
                f"the model's context of {limits.context_length}; lower it, or max_prompt_tokens to drop such prompts",
            )
    return [PromptExample(prompt_ids, record.prompt) for record, prompt_ids, _ in kept]


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
    completions: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> list[tuple[Any, list[int], list[list[int]]]]:
    """The records within the limits, each with the ids of its prompt and of its completions."""
    eos = eos_token_id(tokenizer)
    prompts = encode_prompts(records, tokenizer)
    flat = iter(encode(tokenizer, [text for texts in completions for text in texts]))
    kept = []
    for record, prompt_ids, texts in zip(records, prompts, completions, strict=True):
        completion_ids = [next(flat) for _ in texts]
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
        for name, ids in zip(record.fields[1:], completion_ids, strict=False):
            if not ids:
                raise field_error(record.where, name, "the tokenizer makes no token of it")
        kept.append((record, prompt_ids, [ended(ids, eos, room) for ids in completion_ids]))
    dropped = f"dropped {len(records) - len(kept)} of {len(records)} prompts: over {limits.max_prompt_tokens} tokens"
    if not kept:
        raise DataError(f"no data is left to use: {dropped}" if records else "there are no records to use")
    if len(kept) < len(records):
        logger.warning(dropped)
    return kept


def ended(ids: list[int], eos: int, room: int) -> list[int]:
    """A completion with the EOS that it may already carry as text, cut to the room there is."""
    return (ids if ids[-1] == eos else [*ids, eos])[:room]


def encode_prompts(records: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of every prompt: at least one, since something must come before the first token to predict."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = iter(encode_openings(tokenizer, [record.prompt for record in records if isinstance(record.prompt, str)]))
    rendered = [render(record, tokenizer) for record in records if not isinstance(record.prompt, str)]
    chats = iter(encode(tokenizer, rendered))
    return [next(texts if isinstance(record.prompt, str) else chats) or [first] for record in records]


def encode_openings(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids with the special tokens that begin a text (BOS, CLS), without those that end one (EOS, SEP): it goes on."""
    if not texts:
        return []
    encoded = tokenizer(texts, return_attention_mask=False, return_special_tokens_mask=True, verbose=False)
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    for ids, added in zip(encoded.input_ids, encoded.special_tokens_mask, strict=True):
        while ids and added[len(ids) - 1] and ids[-1] in closing:
            ids.pop()
    return encoded.input_ids


def render(record: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the tokenizer's chat template writes it, up to where the assistant begins to answer."""
    if not tokenizer.chat_template:
        raise field_error(record.where, record.fields[0], "has messages, but the tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template(record.prompt, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        reason = f"the chat template refuses it: {first_line(error)}"
        raise field_error(record.where, record.fields[0], reason) from error


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of every text, with no special tokens added: in one call, which tokenizers run in parallel."""
    if not texts:
        return []
    # verbose would warn of texts longer than the model's context, which are cut further on.
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a completion or document."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r}: has no EOS token, so no completion could end; "
            "set its eos_token and save it again"
        )
    return tokenizer.eos_token_id


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
]
