"""What the assistant is asked and what it answers, as text or as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from rlhf.fields import (
    Message,
    check_message,
    check_messages,
    check_string,
    counted,
    field_error,
    first_line,
    kind,
    messages,
    not_blank,
    typed,
)
from rlhf.sources import Record

Prompt: TypeAlias = str | list[Message]
"""A text, or the messages of a conversation. If they end with the assistant's turn, the completion continues it."""

Completion: TypeAlias = str | Message
"""What the assistant says, or its whole turn if that has more than content: calls of tools, reasoning."""

BESIDE_CONTENT = ("tool_calls", "reasoning_content", "thinking")
"""The fields of a turn that are trained on besides its content."""


def prompt(record: Record, where: str) -> Prompt:
    """The field ``prompt``. If it is a string and an answer is a message, it becomes a message of the user."""
    asked = stated_prompt(record, where)
    completions = record.get("completions")
    answers = [record.get(name) for name in ("completion", "chosen", "rejected")]
    answers += completions if isinstance(completions, list) else []
    if isinstance(asked, str) and any(map(is_conversation, answers)):
        return [{"role": "user", "content": asked}]
    return asked


def stated_prompt(record: Record, where: str) -> Prompt:
    """The field ``prompt`` as it is."""
    if isinstance(record.get("prompt"), list):
        return messages(record, "prompt", where)
    return check_string(typed(record, "prompt", str, "a string or an array of messages", where), "prompt", where)


def before_answer(record: Record, turns: list[Message], name: str, where: str) -> list[Message]:
    """The turns of the field ``name`` before its answer. If the record also has a ``prompt``, they must contain it."""
    if not turns:
        raise field_error(where, name, "has no turn before the assistant's")
    if turns[-1]["role"] == "assistant":
        raise field_error(where, name, "ends with two turns of the assistant in a row, but one is an answer")
    if "prompt" in record:
        stated = stated_prompt(record, where)
        if isinstance(stated, str):
            held = any(turn["content"].strip() == stated.strip() for turn in turns)
        else:
            held = turns[: len(stated)] == stated
        if not held:
            raise field_error(where, "prompt", f"is not what {name!r} begins with")
    return turns


def answer(value: Any, name: str, where: str, *, may_be_blank: bool = False) -> Completion:
    """A completion: a string, the assistant's message, or an array of that message alone."""
    if not is_conversation(value):
        text = check_string(value, name, where)
        return text if may_be_blank else not_blank(text, name, where)
    if isinstance(value, list):
        if len(check_messages(value, name, where)) > 1:
            raise field_error(where, name, f"has {counted(value)}, expected the assistant's message alone")
        value, name = value[0], f"{name}[0]"
    return spoken(check_message(value, name, where), name, where, may_be_blank=may_be_blank)


def spoken(turn: Message, name: str, where: str, *, may_be_blank: bool) -> Completion:
    """What the assistant says in the turn that is the completion."""
    if turn["role"] != "assistant":
        raise field_error(where, f"{name}.role", f"is {turn['role']!r}, expected 'assistant'")
    if any(key in turn for key in BESIDE_CONTENT):
        return turn
    return turn["content"] if may_be_blank else not_blank(turn["content"], f"{name}.content", where)


def is_conversation(value: Any) -> bool:
    """Whether a value has to be read as messages, since it is no text."""
    return isinstance(value, (list, Mapping))


def tools(record: Record, asked: Prompt, where: str) -> list[dict[str, Any]] | None:
    """The functions that the assistant may call, for the chat template: an array, or JSON of an array in a string."""
    found = record.get("tools")
    if not found or isinstance(asked, str):
        return None
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise field_error(where, "tools", f"is a string that holds no JSON: {first_line(error)}") from error
    if not isinstance(found, list):
        raise field_error(where, "tools", f"is {kind(found)}, expected an array of objects")
    for i, tool in enumerate(found):
        if not isinstance(tool, Mapping):
            raise field_error(where, f"tools[{i}]", f"is {kind(tool)}, expected an object")
    return found or None
