"""Where records come from: every kind of file, the hub, and what Python holds in memory."""

import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.records import (
    DataError,
    PromptRecord,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_texts,
)
from rlhf.sources import sources

RECORDS = [{"prompt": "p", "completion": "c"}, {"prompt": "ü", "completion": "d", "id": 1}]


def zipped(content):
    """Compresses without the time of day, by which the names of tests would differ between processes."""
    return gzip.compress(content, mtime=0)


def as_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_array(records):
    return json.dumps(records, indent=2).encode()


def as_parquet(records):
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def wheres(data):
    return [record.where for record in read_prompts(data)]


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("d.jsonl", as_lines, [":1", ":2"]),
        ("d.ndjson", as_lines, [":1", ":2"]),
        ("data", as_lines, [":1", ":2"]),
        ("d.json", as_lines, [":1", ":2"]),
        ("d.json", as_array, [":2 (record 1)", ":6 (record 2)"]),
        ("d.json", lambda records: b"\xef\xbb\xbf\n \r\n" + as_array(records), [":4 (record 1)", ":8 (record 2)"]),
        ("d.json", lambda records: json.dumps(records).encode(), [":1 (record 1)", ":1 (record 2)"]),
        ("d.parquet", as_parquet, [":row 1", ":row 2"]),
    ],
)
def test_every_kind_of_file(tmp_path, name, content, places, compressed):
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(zipped(content(RECORDS)) if compressed else content(RECORDS))
    for data in (path, str(path), [path], (str(path),)):
        found = read_demonstrations(data)
        assert [(record.prompt, record.completion) for record in found] == [("p", "c"), ("ü", "d")]
        assert [record.where for record in found] == [f"{path}{place}" for place in places]


def test_compressed_text(tmp_path):
    path = tmp_path / "t.txt.gz"
    path.write_bytes(zipped(b"a\r\nb"))
    assert read_texts(path) == ["a\nb"]
    with pytest.raises(DataError, match=r"t\.txt\.gz: is plain text, which has no fields"):
        read_prompts(path)


GOOD = '[\n  {"prompt": "p"},\n  '


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.json", "", ": is empty; it holds no records"),
        ("d.json", " [ \n ] ", ": is empty; it holds no records"),
        ("d.json", GOOD + "7]", ":3 (record 2): is an integer, expected an object with named fields"),
        ("d.json", GOOD + '{"prompt": 7}]', ":3 (record 2): field 'prompt': is an integer, expected a string"),
        ("d.json", GOOD + '{"prompt": }]', ":3: invalid JSON at column 14: Expecting value"),
        ("d.json", GOOD + '{"prompt":\n "p"}\n {', ":5: invalid JSON at column 2: Expecting ',' delimiter"),
        ("d.json", GOOD + "]", ":3: invalid JSON at column 3: Expecting value"),
        ("d.json", GOOD, ":3: invalid JSON at column 3: Expecting value"),
        ("d.json", '[{"prompt": "p"}', ":1: invalid JSON at column 17: Expecting ',' delimiter"),
        ("d.json", '[{"prompt": "p"}]\n]', ":2: invalid JSON at column 1: Extra data"),
        ("d.json", "[" * 100_000, ":1 (record 1): invalid JSON: maximum recursion depth exceeded"),
        ("d.json", '\n{\n  "data": []}', ":2: begins one object; expected an array of records, or a record a line"),
        ("d.json", '{"prompt": "p"}\n{"prompt": 7}', ":2: field 'prompt': is an integer, expected a string"),
        ("d.json", b"[\n\xff]", ":2: invalid UTF-8 at byte 1 of the line (0xff)"),
        ("d.jsonl.gz", '{"prompt": "p"}', ": could not be read: Not a gzipped file"),
        (
            "d.jsonl.gz",
            zipped(as_lines(RECORDS * 99))[:-9],
            ": could not be read: Compressed file ended",
        ),
        (
            "d.jsonl.gz",
            zipped(b"")[:10] + b"\xff" * 20,
            ": could not be read: Error -3 while decompressing",
        ),
        (
            "d.json.gz",
            zipped(b"[7]"),
            ":1 (record 1): is an integer, expected an object with named fields",
        ),
        ("d.parquet.gz", as_parquet(RECORDS), ": could not be read: Not a gzipped file"),
        ("d.parquet.gz", zipped(b"text"), ": is no readable Parquet file: "),
        ("missing.json.gz", None, ": no such file"),
        ("missing.parquet.gz", None, ": no such file"),
    ],
)
def test_broken_files(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}{reason}")
    assert "\n" not in str(error.value)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    records=st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), min_size=1, max_size=5),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
)
def test_an_array_is_read_as_json_reads_it(tmp_path_factory, records, indent, ascii_only):
    path = tmp_path_factory.mktemp("data") / "data.json"
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace")
    path.write_bytes(text)
    [source] = sources(path)
    found = list(source.records)
    assert [record for _, record in found] == json.loads(text)
    # Each record begins on the line that its place names, and records are numbered from 1.
    numbers = [int(where.removeprefix(f"{path}:").split(" ")[0]) for where, _ in found]
    assert [where.split("(")[1] for where, _ in found] == [f"record {i})" for i in range(1, len(found) + 1)]
    assert all("{" in text.decode().split("\n")[number - 1] for number in numbers)
    assert numbers == sorted(numbers)


# In memory -----------------------------------------------------------------------------------------------------------


def test_lists_of_dicts():
    assert wheres(RECORDS) == wheres(tuple(RECORDS)) == ["records[0]", "records[1]"]
    assert read_texts([{"text": "a"}, {"text": " "}]) == ["a"]
    with pytest.raises(DataError, match=r"^records\[1\]: field 'completion': is missing; the record has 'prompt'$"):
        read_demonstrations([RECORDS[0], {"prompt": "p"}])
    with pytest.raises(DataError, match=r"^records\[1\]: is a string, expected a dict like those before it$"):
        read_demonstrations([RECORDS[0], "data.jsonl"])


def test_data_sets():
    import datasets

    names = ("prompt", "completion", "id", "messages")
    records = [*RECORDS, {"messages": [{"role": "user", "content": "u"}]}]
    data = datasets.Dataset.from_list([{name: record.get(name) for name in names} for record in records])
    for made in (data, data.with_format("torch"), data.to_iterable_dataset()):
        # Columns that a record lacks are null in its row, and count as missing.
        found = read_prompts(made)
        assert found == [
            PromptRecord("p", "records[0]", extra={"completion": "c"}),
            PromptRecord("ü", "records[1]", extra={"completion": "d", "id": 1}),
            PromptRecord([{"role": "user", "content": "u"}], "records[2]", ("messages",)),
        ]
    with pytest.raises(DataError, match=r"^records: is empty; it holds no records$"):
        read_prompts(data.select([]))
    splits = datasets.DatasetDict(train=data, test=data)
    for wrong, name in ((splits, "records"), ([splits], r"records\[0\]")):
        with pytest.raises(
            DataError, match=rf"^{name}: is a DatasetDict of the splits 'train', 'test', one of which has"
        ):
            read_prompts(wrong)


def test_nulls_within_the_rows_of_a_table_count_as_not_there():
    import datasets

    turns = [
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": name, "arguments": {name: 1}}} for name in ("f", "g")],
        },
        {"role": "tool", "content": "r", "name": "f"},
        {"role": "assistant", "content": "c"},
    ]
    [found] = read_demonstrations(datasets.Dataset.from_list([{"messages": turns}]))
    assert found.prompt == [turns[0], turns[1] | {"content": ""}, turns[2]]


def test_sources_are_mixed(tmp_path):
    import datasets

    path = tmp_path / "d.jsonl"
    path.write_bytes(as_lines(RECORDS))
    data = [path, datasets.Dataset.from_list(RECORDS), RECORDS, str(path)]
    lines = [f"{path}:1", f"{path}:2"]
    assert wheres(data) == [*lines, "records[1][0]", "records[1][1]", "records[2][0]", "records[2][1]", *lines]


def test_ties_are_counted_for_each_source():
    untied = {"prompt": "p", "completions": ["x", "y"], "ranks": [1, 2]}
    with pytest.raises(DataError, match=r"^records\[1\]: field 'ranks': every comparison is tied \(1 of 1\)$"):
        read_comparisons([[untied], [untied | {"ranks": [1, 1]}]])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "records: is empty; it holds no records"),
        (None, "records: is of type NoneType; expected a path, a list of records or a datasets.Dataset"),
        ({"prompt": "p"}, "records: is of type dict; expected a path, a list of records or a datasets.Dataset"),
        (iter(RECORDS), "records: is of type list_iterator; expected a path, a list of records or a datasets.Dataset"),
        ([7], "records[0]: is of type int; expected a path, a list of records or a datasets.Dataset"),
    ],
)
def test_what_is_no_data_is_named(data, reason):
    for read in (read_demonstrations, read_comparisons, read_prompts, read_texts):
        with pytest.raises(DataError) as error:
            read(data)
        assert str(error.value) == reason


def test_a_record_among_sources_is_named():
    with pytest.raises(DataError, match=r"^records\[1\]: is of type dict; expected a path, a list of records or a"):
        read_prompts([RECORDS, RECORDS[0]])


def test_an_empty_path_is_no_data_set(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(DataError, match=r"^\.: is a directory, expected a file$"):
        read_prompts(Path())
