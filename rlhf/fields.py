"""Checks of a record's fields. Each returns a value of the right kind, or raises a :class:`DataError` that says why."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from rlhf.errors import UserError

Message: TypeAlias = dict[str, Any]
"""A turn of a conversation: ``role`` and ``content``, both strings, and those of ``TURN_FIELDS`` that it has."""

TURN_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""The fields of a turn that chat templates read besides its role and content."""
MISNAMED = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles. Most templates would write them unchanged, but no model knows them."""

KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}

PAGE = "docs/data.md"
FOREIGN = (
    (("instruction", "output"), "Alpaca's", "'prompt' and 'completion'"),
    (("instruction", "response"), "Dolly's", "'prompt' and 'completion'"),
    (("conversations",), "ShareGPT's", "'messages'"),
    (("from", "value"), "ShareGPT's", "'messages'"),
    (("instruction", "completions"), "UltraFeedback's", "'prompt', 'completions' and 'scores'"),
    (("input", "preferred_output"), "OpenAI's", "'prompt', 'chosen' and 'rejected'"),
    (("completion", "label"), "that of unpaired preferences", "demonstrations"),
    (("messages", "label"), "that of unpaired preferences", "demonstrations"),
)
"""Layouts that are known but not read: some of their fields, whose layout it is, and what the page converts it to."""


class DataError(UserError, ValueError):
    """Data that cannot be used; the message is one line: ``file:line: field 'name': reason``."""


def field_error(where: str, name: str, reason: str) -> DataError:
    """The error of one field of one record."""
    return DataError(f"{where}: field {name!r}: {reason}")


def string(record: Mapping[str, Any], name: str, where: str) -> str:
    """A field that is a string."""
    return check_string(typed(record, name, str, "a string", where), name, where)


def present(record: Mapping[str, Any], name: str, where: str) -> Any:
    """A field that must be there."""
    if name not in record:
        raise field_error(where, name, f"is missing; the record has {listed(record)}")
    return record[name]


def typed(record: Mapping[str, Any], name: str, type_: type, expected: str, where: str) -> Any:
    """A field that must be there and have the given type."""
    value = present(record, name, where)
    if not isinstance(value, type_):
        raise field_error(where, name, f"is {kind(value)}, expected {expected}")
    return value


def check_string(value: Any, name: str, where: str) -> str:
    """The value, if it is a string that a tokenizer can read."""
    if not isinstance(value, str):
        raise field_error(where, name, f"is {kind(value)}, expected a string")
    # JSON can escape half of a surrogate pair, which stands for no character and crashes tokenizers.
    if half := re.search("[\ud800-\udfff]", value):
        code = f"\\u{ord(half[0]):04x}"
        raise field_error(where, name, f"holds half of a surrogate pair ({code}), which is no character")
    return value


def not_blank(value: str, name: str, where: str) -> str:
    """The value, if it is not blank: there is nothing to learn from a blank one."""
    if not value.strip():
        raise field_error(where, name, "is empty")
    return value


def check_rank(value: Any, name: str, where: str) -> int:
    """A rank: 1 is the best. Whole floats are accepted, since tables may hold a column of ranks as floats."""
    expected = "expected an integer of at least 1"
    if not is_number(value):
        raise field_error(where, name, f"is {kind(value)}, {expected}")
    if (isinstance(value, float) and not value.is_integer()) or value < 1:
        raise field_error(where, name, f"is {value}, {expected}")
    return int(value)


def check_score(value: Any, name: str, where: str) -> float:
    """A score: a higher one is better."""
    if not is_number(value):
        raise field_error(where, name, f"is {kind(value)}, expected a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise field_error(where, name, f"is {value}, expected a finite number")
    return value


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float; a bool is an instance of int as well, but no number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def messages(record: Mapping[str, Any], name: str, where: str) -> list[Message]:
    """A field with the turns of a conversation."""
    return check_messages(typed(record, name, list, "an array of messages", where), name, where)


def check_messages(turns: Sequence[Any], name: str, where: str) -> list[Message]:
    """The turns of a conversation, reduced to what chat templates read."""
    if not turns:
        raise field_error(where, name, "has no messages")
    return [check_message(turn, f"{name}[{i}]", where) for i, turn in enumerate(turns)]


def check_message(turn: Any, name: str, where: str) -> Message:
    """One turn. Any role is accepted that is not misnamed, since the chat template decides which roles there are."""
    if not isinstance(turn, Mapping):
        raise field_error(where, name, f"is {kind(turn)}, expected an object with 'role' and 'content'")
    has_calls = bool(turn.get("tool_calls"))
    for key in ("role", "content"):
        if key not in turn and not (key == "content" and has_calls):
            raise field_error(where, f"{name}.{key}", f"is missing; the message has {listed(turn)}")
    role = not_blank(check_string(turn["role"], f"{name}.role", where), f"{name}.role", where)
    if role in MISNAMED:
        raise field_error(where, f"{name}.role", f"is {role!r}, expected {MISNAMED[role]!r} or another of a template's")
    content = turn.get("content")
    content = "" if content is None and has_calls else check_content(content, f"{name}.content", where)
    message = {"role": role, "content": content, **{key: turn[key] for key in TURN_FIELDS if turn.get(key)}}
    if has_calls:
        message["tool_calls"] = check_calls(turn["tool_calls"], f"{name}.tool_calls", where)
    return message


def check_calls(calls: Any, name: str, where: str) -> list[dict[str, Any]]:
    """The calls of a turn. Arguments that are JSON in a string, as OpenAI's, are parsed: templates would quote them."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise field_error(where, name, f"is {kind(calls)}, expected an array of objects")
    found = []
    for i, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except (ValueError, RecursionError) as error:
                reason = f"is a string that holds no JSON: {first_line(error)}"
                raise field_error(where, f"{name}[{i}].function.arguments", reason) from error
            call = {**call, "function": {**function, "arguments": arguments}}
        found.append(dict(call))
    return found


def check_content(content: Any, name: str, where: str) -> str:
    """What a turn says: a string, or an array of parts that are text."""
    if not isinstance(content, list):
        return check_string(content, name, where)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise field_error(where, f"{name}[{i}]", f"is {kind(part)}, expected an object with 'type' and 'text'")
        if part.get("type") != "text":
            raise field_error(where, f"{name}[{i}].type", f"is {part.get('type')!r}, but only 'text' is read")
        if "text" not in part:
            raise field_error(where, f"{name}[{i}].text", f"is missing; the part has {listed(part)}")
        texts.append(check_string(part["text"], f"{name}[{i}].text", where))
    return "".join(texts)


def kind(value: Any) -> str:
    """A value's type in the words of JSON."""
    return KINDS.get(type(value), type(value).__name__)


def listed(record: Collection[str]) -> str:
    """The names of a record's fields, and where to read how to convert it if its layout is known but not read."""
    names = ", ".join(map(repr, record)) or "no fields"
    for fields, whose, converted in FOREIGN:
        if all(field in record for field in fields):
            return f"{names}; this layout is {whose}, of which {PAGE} makes {converted}"
    return names


def counted(values: Sequence[Any]) -> str:
    """``1 entry``, ``3 entries``."""
    return f"{len(values)} {'entry' if len(values) == 1 else 'entries'}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, since libraries add paragraphs that would bury it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def type_and_line(error: BaseException) -> str:
    """The exception's type and first line. For errors of code that is not ours, whose message may say too little."""
    return f"{type(error).__name__}: {first_line(error)}"
