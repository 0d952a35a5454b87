"""Pairs of whole conversations, ``chosen`` and ``rejected``: what both begin with is the prompt."""

from __future__ import annotations

import re
from typing import NamedTuple

from rlhf.fields import PAGE, Message, check_message, check_messages, check_string, field_error, kind, present
from rlhf.sources import Record
from rlhf.turns import Completion, Prompt, before_answer, is_conversation, spoken, stated_prompt

PROMPT_NAMES = ("question", "instruction", "input", "query", "post", "context", "history", "messages", "conversations")
"""What other layouts call a prompt. Two texts beside such a field are answers, and do not begin with their prompt."""

ASSISTANT = re.compile(
    r"""
    (?: ^[ \t]* (?:\#+[ ]*)? (?i:assistant) [ ]* :      # HH-RLHF's "\n\nAssistant:"
    |   ^[ \t]* \#+[ ]* (?i:response) [ ]* :            # Alpaca's prompt
    |   \b ASSISTANT:                                   # Vicuna, which puts all turns on one line
    |   <\|im_start\|>assistant
    |   <\|start_header_id\|>assistant<\|end_header_id\|>
    |   <\|assistant\|>
    |   <start_of_turn>model
    |   \[/INST\]
    ) \n*                                               # but no space: it belongs to the answer's first token
    """,
    re.MULTILINE | re.VERBOSE,
)
"""What a transcript writes where the assistant begins to speak."""


class Pair(NamedTuple):
    """Two answers to one prompt. Either may be blank, as some published answers are."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion


def whole_pair(record: Record, where: str) -> Pair | None:
    """The pair of a record whose ``chosen`` and ``rejected`` hold their prompt. None if they are answers alone."""
    chosen, rejected = present(record, "chosen", where), present(record, "rejected", where)
    if is_conversation(chosen) and is_conversation(rejected):
        turns = listed_turns(chosen, "chosen", where), listed_turns(rejected, "rejected", where)
        if "prompt" in record and len(turns[0]) == len(turns[1]) == 1:
            return None
        return pair_of_conversations(record, *turns, where)
    if is_conversation(chosen):
        raise field_error(where, "rejected", f"is {kind(rejected)}, but 'chosen' is {kind(chosen)}")
    if is_conversation(rejected):
        raise field_error(where, "chosen", f"is {kind(chosen)}, but 'rejected' is {kind(rejected)}")
    check_string(chosen, "chosen", where)
    check_string(rejected, "rejected", where)
    if "prompt" in record:
        prompt = stated_prompt(record, where)
        if not isinstance(prompt, str) or not is_transcript(prompt, chosen, rejected):
            return None
    return pair_of_texts(record, chosen, rejected, where)


def listed_turns(value: list | dict, name: str, where: str) -> list[Message]:
    """The turns of a conversation, which may be a single message."""
    return check_messages(value, name, where) if isinstance(value, list) else [check_message(value, name, where)]


def pair_of_conversations(record: Record, chosen: list[Message], rejected: list[Message], where: str) -> Pair:
    """The pair of two lists of turns that differ only in their last turn."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared and len(chosen) > 1:
        raise field_error(where, "rejected", "begins with another turn than 'chosen', so nothing is their prompt")
    answers = []
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) > shared + 1:
            own = f"{name}[{shared}] to [{len(turns) - 1}]"
            raise field_error(where, name, f"has {own} of its own, but only the last turn may differ")
        answers.append(spoken(turns[-1], f"{name}[{shared}]", where, may_be_blank=True))
    return Pair(before_answer(record, chosen[:shared], "chosen", where), *answers)


def pair_of_texts(record: Record, chosen: str, rejected: str, where: str) -> Pair:
    """The pair of two texts that begin with the same prompt."""
    for name in PROMPT_NAMES:
        if name in record and "prompt" not in record:
            reason = f"looks like the prompt of 'chosen' and 'rejected', which is read from 'prompt': {PAGE} renames it"
            raise field_error(where, name, reason)
    end = prompt_end(chosen, rejected)
    if end is None:
        reason = "begins unlike 'chosen', so nothing is their prompt, and the record has no field 'prompt'"
        raise field_error(where, "rejected", reason)
    return Pair(chosen[:end], chosen[end:], rejected[end:])


def prompt_end(chosen: str, rejected: str) -> int | None:
    """How many characters at the beginning of two texts are their prompt; None if that cannot be told.

    The prompt of transcripts ends with the last mark of the assistant that both share. The prompt of other texts is the
    longest common beginning that ends a word, has white space after it in both and leaves something of both. That cuts
    no word in two, and no character from its accents.
    """
    shared = chosen[: shared_length(chosen, rejected)]
    if end := last_mark(shared):
        return end
    if ASSISTANT.search(chosen) and ASSISTANT.search(rejected):
        return None  # two transcripts that differ before the assistant first speaks
    for end in range(len(shared), 0, -1):
        followed = chosen[end : end + 1].isspace() and rejected[end : end + 1].isspace()
        if followed and not shared[end - 1].isspace() and chosen[end:].strip() and rejected[end:].strip():
            return end
    return None


def is_transcript(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether both texts repeat the prompt up to where the assistant speaks.

    Answers that only begin with the words of their prompt ("Hello" to "Hello") do not count, and are left unchanged.
    """
    begin = prompt.rstrip()
    if not begin or not (chosen.startswith(begin) and rejected.startswith(begin)):
        return False
    return last_mark(chosen[: shared_length(chosen, rejected)]) >= len(begin)


def last_mark(text: str) -> int:
    """Where the last mark of the assistant ends; 0 if there is none."""
    return max((mark.end() for mark in ASSISTANT.finditer(text)), default=0)


def shared_length(first: str, second: str) -> int:
    """The length of the longest common beginning, by bisection: texts are long, and there are many."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
