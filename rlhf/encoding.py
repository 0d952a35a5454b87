"""Prompts and completions as token ids: plain texts, and conversations as the tokenizer's chat template writes them.

Training sees what a rollout sees: the ids of the prompt alone, then those of the completion up to what ends it. That is
EOS after a text, and after a message what the template ends a turn of the assistant with (:func:`turn_end`).
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
"""The ids of a prompt and of its completions, each with what ends it; none of a completion that gives no token."""

REFUSALS = (TemplateError, TypeError, ValueError)
"""What a template raises of its own accord, and what Python does within one that does not expect its input."""
PROBE = "zqprobe"
"""A content that no template writes by itself."""


def encode_records(
    records: Sequence[Any], completions: Sequence[Sequence[Completion]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded]:
    """The ids of every record's prompt, at least one, and of the completions that go with it."""
    pairs = list(zip(records, completions, strict=True))
    texts = iter(encode_texts([pair for pair in pairs if isinstance(pair[0].prompt, str)], tokenizer))
    chats = iter(encode_chats([pair for pair in pairs if not isinstance(pair[0].prompt, str)], tokenizer))
    # Something must come before the first token to predict.
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = (next(texts if isinstance(record.prompt, str) else chats) for record in records)
    return [(prompt or [first], answers) for prompt, answers in encoded]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of every text, with no special tokens added: in one call, which tokenizers run in parallel."""
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
    """Ids with the special tokens that begin a text (BOS, CLS), without those that end one (EOS, SEP): it goes on."""
    if not texts:
        return []
    encoded = tokenizer(texts, return_attention_mask=False, return_special_tokens_mask=True, verbose=False)
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    for ids, added in zip(encoded.input_ids, encoded.special_tokens_mask, strict=True):
        while ids and added[len(ids) - 1] and ids[-1] in closing:
            ids.pop()
    return encoded.input_ids


def ended(ids: list[int], end: list[int]) -> list[int]:
    """A completion with its end, which it may already carry as text; nothing remains nothing."""
    return ids if not ids or ids[-len(end) :] == end else [*ids, *end]


# Conversations ---------------------------------------------------------------------------------------------------


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which a turn of the assistant ends: what the chat template writes after its content, up to the last
    special or added token. ``[EOS]`` if there is no template, or one that writes no such token.
    """
    return how_turns_end(tokenizer)[0]


def how_turns_end(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """:func:`turn_end`, and what to take from the end of a conversation where the template writes no special token."""
    final = after_answer(tokenizer)
    if final is None:
        return [eos_token_id(tokenizer)], ""
    going_on = after_answer(tokenizer, {"role": "user", "content": "q"})
    ids = encode(tokenizer, [final, final if going_on is None else going_on])
    special = special_ids(tokenizer)
    shared = [token for token, _ in itertools.takewhile(lambda both: both[0] == both[1], zip(*ids, strict=False))]
    # What ends a turn stands there whether the conversation goes on or not; Phi-3's template writes EOS after the last
    # one as well. GPT-OSS's ends the last turn by a token of its own, and an answer is the last.
    for written in (shared, ids[0]):
        ends = [i for i, token in enumerate(written) if token in special]
        if ends:
            return written[: ends[-1] + 1], ""
    return [eos_token_id(tokenizer)], final


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that stand for no text: special ones, and what else was added to the vocabulary."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def after_answer(tokenizer: PreTrainedTokenizerBase, *later: dict[str, str]) -> str | None:
    """What the template writes after an answer, and later turns; None if it writes no such conversation."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": PROBE}, *later]
    try:
        _, found, after = apply_template(tokenizer, turns).rpartition(PROBE)
    except REFUSALS:
        return None
    return after if found else None


def encode_chats(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Prompts as the template writes them, and completions as what it adds to them in the whole conversation.

    Where the whole does not begin with the prompt (one may open a ``<think>`` that the other lacks), a completion is
    its own text and the end of the turn.
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
        elif begun:  # the tokenizer has joined the prompt's end to the answer, which no rollout can
            own = until_end(encode(tokenizer, [whole[len(prompts[i]) :]])[0], end)
        elif isinstance(answer, str):
            own = encode(tokenizer, [answer])[0]
        else:
            record = pairs[i][0]
            reason = "the chat template writes the prompt in another way before such an answer"
            raise field_error(record.where, record.fields[1 + len(answers[i])], reason)
        if begun and own and end[-1] not in own and own[-1] in special:
            answers[i].append(own)  # GPT-OSS's template ends a call in another way than a text
        else:
            answers[i].append([] if own == end else ended(own, end))
    return list(zip(prompt_ids, answers, strict=True))


def until_end(ids: list[int], end: list[int]) -> list[int]:
    """The ids up to the last end of a turn, which the content may carry as text as well: it counts once."""
    if end[-1] in ids:
        ids = ids[: len(ids) - ids[::-1].index(end[-1])]
    while ids[-2 * len(end) :] == end * 2:
        ids = ids[: -len(end)]
    return ids


def render(record: Any, tokenizer: PreTrainedTokenizerBase, answer: Completion | None = None) -> str:
    """A conversation as the template writes it: up to where the assistant begins to answer, or with its answer.

    A prompt that ends with the assistant's own turn is written up to the end of what it says there, and goes on so.
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
    """The prompt's turns and the answer, which may go on with the last of them."""
    if answer is None:
        return record.prompt
    turn = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    *before, last = record.prompt
    if last["role"] != "assistant":
        return [*record.prompt, turn]
    return [*before, last | turn | {"content": last["content"] + turn["content"]}]


def check_written(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises if the template leaves out what a role says or calls, or the tools: some do, without a word.

    It is told by whether the text changes with the part: once for each role in a first turn and once in a later one,
    since each try costs as much as writing the conversation.
    """
    seen: set[tuple[str, str, bool]] = set()

    def is_new(role: str, key: str, first: bool = False) -> bool:
        known = (role, key, first) in seen
        seen.add((role, key, first))
        return not known

    for record, completions in pairs:
        for i, turn in enumerate(record.prompt):
            # Beside a call many templates write no content, and of earlier turns no reasoning.
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
    """A content or a list of calls that is another."""
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [changed(inner) for inner in value]
    return {key: changed(inner) if key in ("function", "name") else inner for key, inner in value.items()}


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[Message], **options: Any) -> str:
    """The text of a conversation."""
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
