"""Reading data: every record is checked before anything is trained on it.

==============  =========================================================================================
demonstrations  ``{"prompt", "completion"}``, or ``{"messages"}``, whose last turn, the assistant's, is the
                completion and everything before it the prompt
comparisons     ``{"prompt", "completions": [K], "ranks": [K]}`` (1 is best, ties allowed), or
                ``{"prompt", "chosen", "rejected"}``
prompts         ``{"prompt"}``, or any of the above
texts           ``{"text"}``, or plain text: a ``.txt`` file is one document
==============  =========================================================================================

A prompt is a string or a list of messages ``{"role", "content"}``. Further fields are ignored. Records come from a
local ``.parquet`` file, from any other local file as JSON lines, or from a data set on the hub: ``name`` or
``name:split``. What is wrong with one is a :class:`DataError` of one line, with file, line and field.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

logger = logging.getLogger(__name__)

Prompt: TypeAlias = str | list[dict[str, str]]
"""A text, or the messages of a conversation."""

ROLES = ("system", "user", "assistant")
KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}
FILE_SUFFIXES = (".jsonl", ".json", ".json-lines", ".ndjson", ".parquet", ".txt")


class DataError(ValueError):
    """Data that cannot be used; the message is one line: ``file:line: field 'name': reason``."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and how a labeller answered it."""

    prompt: Prompt
    completion: str
    where: str
    """``file:line``."""
    fields: tuple[str, ...] = ("prompt", "completion")
    """What the record calls its prompt and its completion, for later errors."""


@dataclass(frozen=True)
class Comparison:
    """A prompt with K completions, ranked by a labeller: 1 is best, equal ranks are ties."""

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    where: str
    fields: tuple[str, ...]
    """What the record calls its prompt and each of its completions."""


@dataclass(frozen=True)
class PromptRecord:
    """A prompt alone."""

    prompt: Prompt
    where: str
    fields: tuple[str, ...] = ("prompt",)


def read_demonstrations(paths: Sequence[str]) -> list[Demonstration]:
    """All demonstrations of the files and data sets, in order."""
    return [demonstration(record, where) for path in paths for where, record in read_records(path)]


def read_comparisons(paths: Sequence[str]) -> list[Comparison]:
    """All comparisons in order, without those whose completions are all tied: they hold no preference."""
    comparisons: list[Comparison] = []
    for path in paths:
        found = [comparison(record, where) for where, record in read_records(path)]
        untied = [record for record in found if len(set(record.ranks)) > 1]
        if not untied:
            raise DataError(f"{path}: field 'ranks': every comparison is tied ({len(found)} of {len(found)})")
        if len(untied) < len(found):
            logger.warning("%s: skipped %d of %d comparisons: all tied", path, len(found) - len(untied), len(found))
        comparisons += untied
    return comparisons


def read_prompts(paths: Sequence[str]) -> list[PromptRecord]:
    """All prompts in order."""
    return [prompt_record(record, where) for path in paths for where, record in read_records(path)]


def read_texts(paths: Sequence[str]) -> list[str]:
    """All documents in order; those that are blank, of which some data sets are full, are left out."""
    texts: list[str] = []
    for path in paths:
        if path.endswith(".txt"):
            found = ["".join(line for _, line in read_lines(path)).replace("\r\n", "\n")]
        else:
            found = [string(record, "text", where) for where, record in read_records(path)]
        found = [text for text in found if text.strip()]
        if not found:
            raise DataError(f"{path}: holds no text")
        texts += found
    return texts


# One record ------------------------------------------------------------------------------------------------------


def demonstration(record: dict[str, Any], where: str) -> Demonstration:
    """Checks one demonstration."""
    if "messages" in record and "completion" not in record:
        turns = messages(record, "messages", where)
        if turns[-1]["role"] != "assistant":
            raise field_error(where, "messages", f"ends with the turn of the {turns[-1]['role']}, not the assistant's")
        if len(turns) == 1:
            raise field_error(where, "messages", "has no turn before the assistant's")
        completion = not_blank(turns[-1]["content"], f"messages[{len(turns) - 1}].content", where)
        return Demonstration(turns[:-1], completion, where, ("messages", "messages"))
    text = prompt(record, where)
    return Demonstration(text, not_blank(string(record, "completion", where), "completion", where), where)


def comparison(record: dict[str, Any], where: str) -> Comparison:
    """Checks one comparison."""
    text = prompt(record, where)
    if "completions" not in record and ("chosen" in record or "rejected" in record):
        pair = tuple(not_blank(string(record, name, where), name, where) for name in ("chosen", "rejected"))
        return Comparison(text, pair, (1, 2), where, ("prompt", "chosen", "rejected"))
    completions = typed(record, "completions", list, "an array of strings", where)
    names = tuple(f"completions[{i}]" for i in range(len(completions)))
    for name, completion in zip(names, completions, strict=True):
        not_blank(check_string(completion, name, where), name, where)
    if len(completions) < 2:
        raise field_error(where, "completions", f"has {counted(completions)}, but a comparison needs at least 2")
    ranks = typed(record, "ranks", list, "an array of integers", where)
    if len(ranks) != len(completions):
        raise field_error(where, "ranks", f"has {counted(ranks)} but 'completions' has {len(completions)}")
    for i, rank in enumerate(ranks):
        if type(rank) is not int:  # a bool is an instance of int as well, but no rank
            raise field_error(where, f"ranks[{i}]", f"is {kind(rank)}, expected an integer of at least 1")
        if rank < 1:
            raise field_error(where, f"ranks[{i}]", f"is {rank}, expected an integer of at least 1")
    return Comparison(text, tuple(completions), tuple(ranks), where, ("prompt", *names))


def prompt_record(record: dict[str, Any], where: str) -> PromptRecord:
    """Checks the prompt of a record of any kind."""
    if "messages" in record and "prompt" not in record:
        turns = messages(record, "messages", where)
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns:
            raise field_error(where, "messages", "has no turn before the assistant's")
        return PromptRecord(turns, where, ("messages",))
    return PromptRecord(prompt(record, where), where)


def prompt(record: dict[str, Any], where: str) -> Prompt:
    """The field ``prompt``: a string or messages."""
    if isinstance(record.get("prompt"), list):
        return messages(record, "prompt", where)
    value = typed(record, "prompt", str, "a string or an array of messages", where)
    return check_string(value, "prompt", where)


def messages(record: dict[str, Any], name: str, where: str) -> list[dict[str, str]]:
    """A field with the turns of a conversation, reduced to role and content."""
    turns = typed(record, name, list, "an array of messages", where)
    if not turns:
        raise field_error(where, name, "has no messages")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise field_error(where, f"{name}[{i}]", f"is {kind(turn)}, expected an object with 'role' and 'content'")
        for key in ("role", "content"):
            if key not in turn:
                raise field_error(where, f"{name}[{i}].{key}", f"is missing; the message has {listed(turn)}")
            check_string(turn[key], f"{name}[{i}].{key}", where)
        if turn["role"] not in ROLES:
            raise field_error(where, f"{name}[{i}].role", f"is {turn['role']!r}, expected one of {', '.join(ROLES)}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def string(record: dict[str, Any], name: str, where: str) -> str:
    """A field that is a string."""
    return check_string(typed(record, name, str, "a string", where), name, where)


def typed(record: dict[str, Any], name: str, type_: type, expected: str, where: str) -> Any:
    """A field that must be there, and of one type."""
    if name not in record:
        raise field_error(where, name, f"is missing; the record has {listed(record)}")
    if not isinstance(record[name], type_):
        raise field_error(where, name, f"is {kind(record[name])}, expected {expected}")
    return record[name]


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
    """The value, if there is anything in it to learn from."""
    if not value.strip():
        raise field_error(where, name, "is empty")
    return value


def field_error(where: str, name: str, reason: str) -> DataError:
    """The error of one field of one record."""
    return DataError(f"{where}: field {name!r}: {reason}")


def kind(value: Any) -> str:
    """A value's type in the words of JSON."""
    return KINDS.get(type(value), type(value).__name__)


def listed(record: dict[str, Any]) -> str:
    """The names of the fields that are there."""
    return ", ".join(map(repr, record)) or "no fields"


def counted(values: list[Any]) -> str:
    """``1 entry``, ``3 entries``."""
    return f"{len(values)} {'entry' if len(values) == 1 else 'entries'}"


# Files and data sets ---------------------------------------------------------------------------------------------


def read_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of a file or data set, each with where it stands: ``file:line``, or ``file:row N``.

    One at a time, so that of several bad records the first is the one reported.
    """
    if path.endswith(".txt"):
        raise DataError(f"{path}: is plain text, which has no fields; expected JSON lines or Parquet")
    if not path.endswith(FILE_SUFFIXES) and not os.path.exists(path):
        records = rows(path, hub_rows(path))
    elif path.endswith(".parquet"):
        records = rows(path, parquet_rows(path))
    else:
        records = ((where, parse(line.rstrip("\r\n"), where)) for where, line in read_lines(path) if line.strip())
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(f"{path}: is empty; it holds no records")


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """The lines of a UTF-8 file, each as ``file:line`` and text.

    JSON lines are read here and not by ``datasets``, whose errors do not say which line they mean.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                try:
                    # utf-8-sig leaves out the byte order mark that some editors put at the start of a file.
                    yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    position = len(line) - len(error.object) + error.start + 1  # utf-8-sig counts from after the mark
                    raise DataError(f"{where}: invalid UTF-8 at byte {position} of the line (0x{byte:02x})") from error
    except OSError as error:
        raise unreadable(path, error) from error


def parse(line: str, where: str) -> dict[str, Any]:
    """One line of JSON, which must be an object."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: invalid JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets nested as deep
        raise DataError(f"{where}: invalid JSON: {first_line(error)}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {kind(record)}, expected an object with named fields")
    return record


def parquet_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a local Parquet file."""
    import pyarrow.parquet  # what datasets reads Parquet with, without its copy of the file in a cache

    try:
        with open(path, "rb") as file:
            return pyarrow.parquet.read_table(file).to_pylist()
    except OSError as error:
        raise unreadable(path, error) from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is no readable Parquet file: {first_line(error)}") from error


def hub_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a data set on the hub: ``name``, or ``name:split``."""
    import datasets  # only where it is needed: importing it takes a second

    name, _, split = path.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train").to_list()
    except Exception as error:  # network, authorisation, cache, format: whatever it is, it concerns this path
        raise DataError(f"{path}: no such file, and no data set of that name: {first_line(error)}") from error


def rows(path: str, table: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a table, whose columns are null where a record lacks the field."""
    for number, row in enumerate(table, start=1):
        yield f"{path}:row {number}", {name: value for name, value in row.items() if value is not None}


def unreadable(path: str, error: OSError) -> DataError:
    """The error of a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{path}: is a directory, expected a file")
    return DataError(f"{path}: could not be read: {error.strerror or first_line(error)}")


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
