"""Reading and checking data. A bad record stops a run before any model is loaded.

Formats, one JSON object per line (those of TRL, plus ranks):

    demonstrations   {"prompt": "...", "completion": "..."}  or  {"messages": [..., {"role": "assistant", ...}]}
    comparisons      {"prompt": "...", "completions": ["...", ...], "ranks": [1, 3, 2, ...]}   1 is best, ties allowed
                     or  {"prompt": "...", "chosen": "...", "rejected": "..."}
    prompts          {"prompt": "..."}
    pretraining      {"text": "..."}  or plain text in a file named *.txt

A prompt may also be a list of messages. Sources are JSONL files, Parquet files, or data sets that `datasets` can load
by name (``name`` or ``name:split``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Message = dict[str, str]
Record = TypeVar("Record")
LOCAL_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", ".parquet")


class DataError(ValueError):
    """What is wrong with the data, in one line: file, line, field, reason."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and how a labeller answered it."""

    prompt: str | list[Message]
    completion: str
    where: str
    """file:line, for messages."""


@dataclass(frozen=True)
class Comparison:
    """A prompt and K completions with their ranks."""

    prompt: str | list[Message]
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Prompt:
    """A prompt."""

    prompt: str | list[Message]
    where: str


@dataclass(frozen=True)
class Fields:
    """One record as it was read, with checked access to its fields."""

    values: dict[str, Any]
    where: str

    def fail(self, field: str, reason: str) -> DataError:
        """The error to raise for a field."""
        return DataError(f"{self.where}: field {field!r}: {reason}")

    def get(self, field: str, kind: type | tuple[type, ...], kind_name: str) -> Any:
        """A field's value, which must be there and be of a type."""
        if field not in self.values:
            raise self.fail(field, f"is missing; the record has {', '.join(sorted(self.values)) or 'no fields'}")
        value = self.values[field]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fail(field, f"is {_type_name(value)}, must be {kind_name}")
        return value

    def prompt(self) -> str | list[Message]:
        """The field "prompt": text or messages."""
        value = self.get("prompt", (str, list), "text or a list of messages")
        return value if isinstance(value, str) else self.messages("prompt")

    def messages(self, field: str) -> list[Message]:
        """A conversation."""
        value = self.get(field, list, "a list of messages")
        if not value:
            raise self.fail(field, "is empty, must have at least one message")
        for i, message in enumerate(value):
            if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise self.fail(f"{field}[{i}]", 'must be an object with "role" and "content" texts')
        return value

    def completion(self, field: str) -> str:
        """A completion, which must say something."""
        value = self.get(field, str, "text")
        if not value.strip():
            raise self.fail(field, "is empty")
        return value


def read_demonstrations(paths: Sequence[str]) -> list[Demonstration]:
    """Demonstrations from all sources, in order.

    Raises:
        DataError: a source cannot be read, or a record is bad.
    """
    return _read(paths, _demonstration)


def read_comparisons(paths: Sequence[str]) -> list[Comparison]:
    """Comparisons from all sources, in order. Those whose ranks are all tied say nothing and are skipped, with a count.

    Raises:
        DataError: a source cannot be read, a record is bad, or all are tied.
    """
    records = _read(paths, _comparison)
    kept = [record for record in records if len(set(record.ranks)) > 1]
    if len(kept) < len(records):
        logger.warning("%s: skipped %d of %d comparisons: all ranks tied", ", ".join(paths), len(records) - len(kept), len(records))
    if not kept:
        raise DataError(f"{', '.join(paths)}: every comparison has all its ranks tied; nothing to learn from")
    return kept


def read_prompts(paths: Sequence[str]) -> list[Prompt]:
    """Prompts from all sources, in order; demonstrations and comparisons will do as well.

    Raises:
        DataError: a source cannot be read, or a record is bad.
    """
    return _read(paths, lambda fields: Prompt(_any_prompt(fields), fields.where))


def read_texts(paths: Sequence[str]) -> list[str]:
    """Pretraining documents from all sources, in order. A .txt file is one document.

    Raises:
        DataError: a source cannot be read, or a record is bad.
    """
    texts = []
    for path in paths:
        if path.endswith(".txt"):
            texts.append(_decode(_bytes(path), path))
        else:
            texts += _read([path], lambda fields: fields.get("text", str, "text"))
    if not any(text.strip() for text in texts):
        raise DataError(f"{', '.join(paths)}: no text in it")
    return texts


def _demonstration(fields: Fields) -> Demonstration:
    if "messages" in fields.values and "prompt" not in fields.values:
        messages = fields.messages("messages")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise fields.fail("messages", "must end with an assistant's message after at least one other")
        if not messages[-1]["content"].strip():
            raise fields.fail(f"messages[{len(messages) - 1}].content", "is empty")
        return Demonstration(messages[:-1], messages[-1]["content"], fields.where)
    return Demonstration(fields.prompt(), fields.completion("completion"), fields.where)


def _comparison(fields: Fields) -> Comparison:
    prompt = fields.prompt()
    if "chosen" in fields.values and "completions" not in fields.values:
        return Comparison(prompt, (fields.completion("chosen"), fields.completion("rejected")), (1, 2), fields.where)
    completions = fields.get("completions", list, "a list of texts")
    if len(completions) < 2:
        raise fields.fail("completions", f"has {len(completions)}, must have K of at least 2 to compare")
    for i, completion in enumerate(completions):
        if not isinstance(completion, str):
            raise fields.fail(f"completions[{i}]", f"is {_type_name(completion)}, must be text")
        if not completion.strip():
            raise fields.fail(f"completions[{i}]", "is empty")
    ranks = fields.get("ranks", list, "a list of whole numbers")
    if len(ranks) != len(completions):
        raise fields.fail("ranks", f"has {len(ranks)} entries, but completions has {len(completions)}")
    for i, rank in enumerate(ranks):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise fields.fail(f"ranks[{i}]", f"is {rank!r}, must be a whole number from 1 (best)")
    return Comparison(prompt, tuple(completions), tuple(ranks), fields.where)


def _any_prompt(fields: Fields) -> str | list[Message]:
    if "messages" in fields.values and "prompt" not in fields.values:
        messages = fields.messages("messages")
        return messages[:-1] if messages[-1]["role"] == "assistant" and len(messages) > 1 else messages
    return fields.prompt()


def _read(paths: Sequence[str], parse: Callable[[Fields], Record]) -> list[Record]:
    records: list[Record] = []
    for path in paths:
        found = [parse(fields) for fields in _fields(path)]
        if not found:
            raise DataError(f"{path}: is empty; no records in it")
        records += found
    return records


def _fields(path: str) -> Iterator[Fields]:
    """The records of one source."""
    if Path(path).suffix == ".parquet" or not (Path(path).exists() or Path(path).suffix in LOCAL_SUFFIXES):
        yield from _dataset_fields(path)
        return
    # Our own reader rather than that of `datasets`, since an error has to name the line.
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        where = f"{path}:{number}"
        text = _decode(line, where).removeprefix("\ufeff") if number == 1 else _decode(line, where)
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: is {_type_name(value)}, must be an object with fields")
        yield Fields(value, where)


def _dataset_fields(path: str) -> Iterator[Fields]:
    import datasets  # slow to import, and only these sources need it

    try:
        if Path(path).suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=path, split="train")
        else:
            name, _, split = path.partition(":")
            rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: no such file, and no data set could be loaded by that name: {reason}") from error
    for number, row in enumerate(rows):
        yield Fields(dict(row), f"{path}:row {number}")


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 at byte {error.start + 1}") from error


def _type_name(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true/false", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
