"""Where records come from: files, data sets on the hub, and what Python holds in memory."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

from rlhf.fields import DataError, first_line, kind

Record: TypeAlias = Mapping[str, Any]
Data: TypeAlias = Any
"""A path (``str`` or ``os.PathLike``) or a hub name, a list of dicts, a ``datasets.Dataset`` or ``IterableDataset``, or
a list of any of these."""

FILE_SUFFIXES = (".jsonl", ".json", ".json-lines", ".ndjson", ".parquet", ".txt")
"""A name with such an ending, ``.gz`` or not, is a file. Any other name is looked up on the hub if no file has it."""
UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file can raise; the last two come from a damaged gzip file."""
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Source:
    """A file, a data set, or a list of records."""

    name: str
    records: Iterator[tuple[str, Record]]
    """Each record with its place. They are read one at a time, so that the first of several bad ones is reported."""


def sources(data: Data, *, documents: bool = False, name: str = "records") -> Iterator[Source]:
    """All that ``data`` holds, in order. ``documents``: a plain text file is one record, ``{"text"}``.

    The place of a record is ``file:line``, ``file:line (record N)`` in a JSON array, ``file:row N`` in a table, or what
    Python would write for it: ``records[3]``, and ``records[1][3]`` in the second of a list of sources.
    """
    if isinstance(data, (str, os.PathLike)):
        path = str(os.fspath(data))
        yield source(path, read_records(path, documents=documents))
    elif is_data_set(data):
        yield source(name, in_memory(without_nulls(data.with_format(None)), name))
    elif not isinstance(data, (list, tuple)):
        raise DataError(f"{name}: {unusable(data)}; expected a path, a list of records or a datasets.Dataset")
    elif not data or (isinstance(data[0], Mapping) and not is_splits(data[0])):
        yield source(name, in_memory(data, name))
    else:
        for i, item in enumerate(data):
            yield from sources(item, documents=documents, name=f"{name}[{i}]")


def source(name: str, records: Iterator[tuple[str, Record]]) -> Source:
    """A source whose records raise an error if there are none."""

    def checked() -> Iterator[tuple[str, Record]]:
        empty = True
        for record in records:
            empty = False
            yield record
        if empty:
            raise DataError(f"{name}: is empty; it holds no records")

    return Source(name, checked())


# In memory -------------------------------------------------------------------------------------------------------


def in_memory(records: Iterable[Any], name: str) -> Iterator[tuple[str, Record]]:
    """The records of a list or data set, counted from 0 as Python does."""
    for i, record in enumerate(records):
        where = f"{name}[{i}]"
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: is {kind(record)}, expected a dict like those before it")
        yield where, record


def is_data_set(data: Any) -> bool:
    """Whether ``datasets`` made it. Whoever has a data set has imported that library, which takes a second."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, (module.Dataset, module.IterableDataset))


def is_splits(data: Any) -> bool:
    """Whether it is a ``datasets.DatasetDict`` or its like."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, (module.DatasetDict, module.IterableDatasetDict))


def unusable(data: Any) -> str:
    """Says what an object is that cannot be read."""
    if is_splits(data):
        return f"is a {type(data).__name__} of the splits {', '.join(map(repr, data))}, one of which has to be chosen"
    return f"is of type {type(data).__name__}"


def without_nulls(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a table, without the nulls that its columns and structs hold for fields that a record lacks."""
    for row in rows:
        yield {name: filled(value) for name, value in row.items() if value is not None}


def filled(value: Any) -> Any:
    """A value without the nulls of the objects in it."""
    if isinstance(value, dict):
        return {name: filled(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [filled(inner) for inner in value]
    return value


# Files and the hub -----------------------------------------------------------------------------------------------


def read_records(path: str, *, documents: bool) -> Iterator[tuple[str, Record]]:
    """Every record of a file or of a data set on the hub, with its place."""
    name = path.removesuffix(".gz")
    if name.endswith(".txt"):
        if not documents:
            raise DataError(f"{path}: is plain text, which has no fields; expected JSON lines or Parquet")
        yield path, {"text": "".join(line for _, line in read_lines(path)).replace("\r\n", "\n")}
    elif not name.endswith(FILE_SUFFIXES) and not os.path.exists(path):
        yield from numbered(path, hub_rows(path))
    elif name.endswith(".parquet"):
        yield from numbered(path, parquet_rows(path))
    elif name.endswith(".json"):
        yield from json_records(path)
    else:
        yield from line_records(path, read_lines(path))


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers.

    JSON is read here and not by ``datasets``, whose errors do not say which line they mean.
    """
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    # utf-8-sig leaves out the byte order mark that some editors put at the start of a file.
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    position = len(line) - len(error.object) + error.start + 1  # utf-8-sig counts from after the mark
                    raise DataError(
                        f"{path}:{number}: invalid UTF-8 at byte {position} of the line (0x{byte:02x})"
                    ) from error
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def line_records(path: str, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Record]]:
    """JSON lines: a record a line."""
    for number, line in lines:
        if line.strip():
            where = f"{path}:{number}"
            try:
                value = json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: invalid JSON at column {error.colno}: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise DataError(f"{where}: invalid JSON: {first_line(error)}") from error
            yield where, named_fields(value, where)


def json_records(path: str) -> Iterator[tuple[str, Record]]:
    """A ``.json`` file, which is either an array of records or JSON lines."""
    lines = itertools.dropwhile(lambda item: not item[1].strip(), read_lines(path))
    first = next(lines, None)
    if first is None:
        return
    number, line = first
    if line.lstrip().startswith("["):
        yield from array_records(path, number, line + "".join(later for _, later in lines))
    elif line.strip() == "{":
        raise DataError(f"{path}:{number}: begins one object; expected an array of records, or a record a line")
    else:
        yield from line_records(path, itertools.chain([first], lines))


def array_records(path: str, number: int, text: str) -> Iterator[tuple[str, Record]]:
    """The records of a JSON array that begins on line ``number``, read one by one so that each error has its line."""

    def invalid(error: json.JSONDecodeError) -> DataError:
        return DataError(f"{path}:{number + error.lineno - 1}: invalid JSON at column {error.colno}: {error.msg}")

    def skip_space(position: int) -> int:
        return SPACE.match(text, position).end()  # type: ignore[union-attr]  # it always matches, if only nothing

    decoder = json.JSONDecoder()
    position, line, counted_to = skip_space(text.index("[") + 1), number, 0
    for count in itertools.count(1):
        if count == 1 and text[position : position + 1] == "]":
            break
        line, counted_to = line + text.count("\n", counted_to, position), position
        where = f"{path}:{line} (record {count})"
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise invalid(error) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: invalid JSON: {first_line(error)}") from error
        yield where, named_fields(value, where)
        position = skip_space(end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            raise invalid(json.JSONDecodeError("Expecting ',' delimiter", text, position))
        position = skip_space(position + 1)
    position = skip_space(position + 1)
    if position < len(text):
        raise invalid(json.JSONDecodeError("Extra data", text, position))


def named_fields(value: Any, where: str) -> Record:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: is {kind(value)}, expected an object with named fields")
    return value


def parquet_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a local Parquet file."""
    import pyarrow.parquet  # not datasets, which would first copy the file into a cache

    try:
        with open_file(path) as file:
            # Parquet is read from its end, and seeking is slow in a gzip file.
            return pyarrow.parquet.read_table(io.BytesIO(file.read()) if path.endswith(".gz") else file).to_pylist()
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is no readable Parquet file: {first_line(error)}") from error


def hub_rows(path: str) -> Iterable[dict[str, Any]]:
    """The rows of a data set on the hub: ``name``, or ``name:split``."""
    import datasets  # only where it is needed: importing it takes a second

    name, _, split = path.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # network, authorisation, cache, format: whatever it is, it concerns this path
        raise DataError(f"{path}: no such file, and no data set of that name: {first_line(error)}") from error


def numbered(path: str, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Record]]:
    """The rows of a table, counted from 1 as lines are."""
    for number, row in enumerate(without_nulls(rows), start=1):
        yield f"{path}:row {number}", row


def open_file(path: str) -> IO[bytes]:
    """The bytes of a file, decompressed."""
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]  # read alike


def unreadable(path: str, error: Exception) -> DataError:
    """The error of a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{path}: is a directory, expected a file")
    return DataError(f"{path}: could not be read: {getattr(error, 'strerror', None) or first_line(error)}")
