"""Prompts and completions as token ids: plain texts, and conversations as the tokenizer's chat template writes them.

Training sees the same ids as a rollout: those of the prompt, encoded by itself, then those of the completion with its
end. A text ends with EOS, and a message with whatever the template ends a turn of the assistant with
(:func:`turn_end`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf.fields import DataError, Message, field_error, first_line
from rlhf.turns import BESIDE_CONTENT, Completion

Pair: TypeAlias = tuple[Any, Sequence[Completion]]
"""A record with a prompt, and completions of it."""
Encoded: TypeAlias = tuple[list[int], list[list[int]]]
"""The ids of a prompt, and of each completion with its end. A completion that gives no token has no ids at all."""

REFUSALS = (TemplateError, TypeError, ValueError)
"""What a template raises on purpose, and what Python raises in a template that does not expect its input."""
PROBE = "zqprobe"
"""A content that can be found again in the output, because no template writes it by itself."""


def encode_records(
    records: Sequence[Any], completions: Sequence[Sequence[Completion]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded]:
    """The ids of every record's prompt, which are at least one, and of its completions."""
    pairs = list(zip(records, completions, strict=True))
    texts = iter(encode_texts([pair for pair in pairs if isinstance(pair[0].prompt, str)], tokenizer))
    chats = iter(encode_chats([pair for pair in pairs if not isinstance(pair[0].prompt, str)], tokenizer))
    # An empty prompt gets this token, since the model needs a token before the first one that it predicts.
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = (next(texts if isinstance(record.prompt, str) else chats) for record in records)
    return [(prompt or [first], answers) for prompt, answers in encoded]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of every text, without special tokens. One call for all texts, since tokenizers run that in parallel."""
    if not texts:
        return []
    # verbose would warn of texts longer than the model's context, which are cut further on.
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r}: has no EOS token, so no completion could end; "
            "set its eos_token and save it again"
        )
    return tokenizer.eos_token_id


# Texts -----------------------------------------------------------------------------------------------------------


def encode_texts(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Prompts and completions that are plain text, tokenized apart."""
    end = [eos_token_id(tokenizer)]
    prompts = encode_openings(tokenizer, [record.prompt for record, _ in pairs])
    answers = iter(encode(tokenizer, [str(text) for _, texts in pairs for text in texts]))
    return [
        (prompt, [ended(next(answers), end) for _ in texts]) for prompt, (_, texts) in zip(prompts, pairs, strict=True)
    ]


def encode_openings(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids with the special tokens that begin a text (BOS, CLS), but not those that end one: a completion follows."""
    if not texts:
        return []
    encoded = tokenizer(texts, return_attention_mask=False, return_special_tokens_mask=True, verbose=False)
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    for ids, added in zip(encoded.input_ids, encoded.special_tokens_mask, strict=True):
        while ids and added[len(ids) - 1] and ids[-1] in closing:
            ids.pop()
    return encoded.input_ids


def ended(ids: list[int], end: list[int]) -> list[int]:
    """Appends the end of a completion, unless its text already ends with it. Without ids there is nothing to end."""
    return ids if not ids or ids[-len(end) :] == end else [*ids, *end]


# Conversations ---------------------------------------------------------------------------------------------------


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which a turn of the assistant ends: what the chat template writes after its content, up to the last
    special or added token. ``[EOS]`` if there is no template, or one that writes no such token.
    """
    return how_turns_end(tokenizer)[0]


def how_turns_end(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """:func:`turn_end`, and the text to remove after the last turn if the template ends it without a special token."""
    final = after_answer(tokenizer)
    if final is None:
        return [eos_token_id(tokenizer)], ""
    going_on = after_answer(tokenizer, {"role": "user", "content": "q"})
    ids = encode(tokenizer, [final, final if going_on is None else going_on])
    special = special_ids(tokenizer)
    shared = [token for token, _ in itertools.takewhile(lambda both: both[0] == both[1], zip(*ids, strict=False))]
    # What ends a turn follows it both at the end of a conversation and in the middle, so it is in the part that both
    # share. (Phi-3's template also writes EOS after the last turn.) GPT-OSS's template ends the last turn with another
    # token than the turns before it, so no special token is shared. An answer is the last turn, so that token counts.
    for written in (shared, ids[0]):
        ends = [i for i, token in enumerate(written) if token in special]
        if ends:
            return written[: ends[-1] + 1], ""
    return [eos_token_id(tokenizer)], final


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that stand for no text: the special ones, and all others that were added to the vocabulary."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def after_answer(tokenizer: PreTrainedTokenizerBase, *later: dict[str, str]) -> str | None:
    """What the template writes after an answer that ``later`` turns follow; None if it writes no such conversation."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": PROBE}, *later]
    try:
        _, found, after = apply_template(tokenizer, turns).rpartition(PROBE)
    except REFUSALS:
        return None
    return after if found else None


def encode_chats(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """The ids of prompts as the template writes them, and of completions as what the whole conversation adds to them.

    If the whole conversation does not begin with the prompt (one may open a ``<think>`` that the other lacks), the
    completion is its own text with the end of a turn.
    """
    if not pairs:
        return []
    check_written(pairs, tokenizer)
    end, trailing = how_turns_end(tokenizer)
    special = special_ids(tokenizer)
    prompts = [render(record, tokenizer) for record, _ in pairs]
    prompt_ids = encode(tokenizer, prompts)
    parts = [(i, answer) for i, (_, completions) in enumerate(pairs) for answer in completions]
    wholes = [render(pairs[i][0], tokenizer, answer).removesuffix(trailing) for i, answer in parts]
    answers: list[list[list[int]]] = [[] for _ in pairs]
    for (i, answer), whole, ids in zip(parts, wholes, encode(tokenizer, wholes), strict=True):
        begun, prompt = whole.startswith(prompts[i]), prompt_ids[i]
        if begun and ids[: len(prompt)] == prompt:
            own = until_end(ids[len(prompt) :], end)
        elif begun:  # one token spans the prompt's end and the answer's beginning, which a rollout cannot sample
            own = until_end(encode(tokenizer, [whole[len(prompts[i]) :]])[0], end)
        elif isinstance(answer, str):
            own = encode(tokenizer, [answer])[0]
        else:
            record = pairs[i][0]
            reason = "the chat template writes the prompt in another way before such an answer"
            raise field_error(record.where, record.fields[1 + len(answers[i])], reason)
        if begun and own and end[-1] not in own and own[-1] in special:
            answers[i].append(own)  # GPT-OSS's template ends a call with another token than a text
        else:
            answers[i].append([] if own == end else ended(own, end))
    return list(zip(prompt_ids, answers, strict=True))


def until_end(ids: list[int], end: list[int]) -> list[int]:
    """The ids up to the last end of a turn. If the content ends with the same tokens as text, they are kept once."""
    if end[-1] in ids:
        ids = ids[: len(ids) - ids[::-1].index(end[-1])]
    while ids[-2 * len(end) :] == end * 2:
        ids = ids[: -len(end)]
    return ids


def render(record: Any, tokenizer: PreTrainedTokenizerBase, answer: Completion | None = None) -> str:
    """The text of a conversation: with the answer, or without one up to where the assistant begins to answer.

    If the prompt ends with a turn of the assistant, its text stops right after the content of that turn, so that the
    answer continues it.
    """
    if not tokenizer.chat_template:
        raise field_error(record.where, record.fields[0], "has messages, but the tokenizer has no chat template")
    begun = record.prompt[-1]["role"] == "assistant"
    options = {"continue_final_message": begun, "add_generation_prompt": not begun} if answer is None else {}
    try:
        return apply_template(tokenizer, conversation(record, answer), tools=record.tools, **options)
    except REFUSALS as error:
        reason = f"the chat template refuses it: {first_line(error)}"
        raise field_error(record.where, record.fields[0], reason) from error


def conversation(record: Any, answer: Completion | None) -> list[Message]:
    """The prompt's turns and the answer. If the prompt ends with the assistant's turn, the answer is joined to it."""
    if answer is None:
        return record.prompt
    turn = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    *before, last = record.prompt
    if last["role"] != "assistant":
        return [*record.prompt, turn]
    return [*before, last | turn | {"content": last["content"] + turn["content"]}]


def check_written(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises if the template leaves out what a role says or calls, or the tools. Some templates do so silently.

    To find out, the part is changed: if the text stays the same, the template left the part out. Each try costs as much
    as writing the conversation, so a role is tried only once in a first turn and once in a later one.
    """
    seen: set[tuple[str, str, bool]] = set()

    def is_new(role: str, key: str, first: bool = False) -> bool:
        known = (role, key, first) in seen
        seen.add((role, key, first))
        return not known

    for record, completions in pairs:
        for i, turn in enumerate(record.prompt):
            # Many templates write no content beside a call, and no reasoning in earlier turns. Neither is an error.
            key = "tool_calls" if "tool_calls" in turn else "content"
            if turn[key] and is_new(turn["role"], key, i == 0):
                prompt = [*record.prompt[:i], turn | {key: changed(turn[key])}, *record.prompt[i + 1 :]]
                if render(replace(record, prompt=prompt), tokenizer) == render(record, tokenizer):
                    reason = f"the chat template leaves out the {key} of a turn of the {turn['role']}"
                    raise field_error(record.where, record.fields[0], reason)
        for name, answer in zip(record.fields[1:], completions, strict=False):
            for key in BESIDE_CONTENT:
                if isinstance(answer, dict) and key in answer and is_new("answer", key):
                    other = answer | {key: changed(answer[key])}
                    if render(record, tokenizer, other) == render(record, tokenizer, answer):
                        raise field_error(record.where, name, f"the chat template leaves out its {key}")
        if not record.tools or not is_new("", "tools"):
            continue
        if render(replace(record, tools=None), tokenizer) == render(record, tokenizer):
            raise field_error(record.where, "tools", "the chat template leaves them out")


def changed(value: Any) -> Any:
    """A content or a list of calls that differs from the one given."""
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [changed(inner) for inner in value]
    return {key: changed(inner) if key in ("function", "name") else inner for key, inner in value.items()}


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[Message], **options: Any) -> str:
    """The text of a conversation."""
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
