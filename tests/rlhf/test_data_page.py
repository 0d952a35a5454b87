"""docs/data.md: its examples are read, and its conversions are run, so that none can go stale."""

import json
import re
from pathlib import Path

import datasets
import pytest

from rlhf.records import DataError, read_comparisons, read_demonstrations, read_prompts, read_texts

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
READ = {
    "demonstrations": read_demonstrations,
    "comparisons": read_comparisons,
    "prompts": read_prompts,
    "texts": read_texts,
}
BLOCKS = [(info.split(), body) for info, body in re.findall(r"^```(.+?)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)]
EXAMPLES = [(info[1], [json.loads(line) for line in body.splitlines()]) for info, body in BLOCKS if info[0] == "json"]
FOREIGN = {name: records for name, records in EXAMPLES if name not in READ}
CONVERSIONS = [(info[1], info[2], body) for info, body in BLOCKS if info[0] == "python"]

ASKED, ANSWER = "What is 2 + 2?", "4."


@pytest.mark.parametrize(
    ("kind", "record"), [(kind, record) for kind, records in EXAMPLES if kind in READ for record in records]
)
def test_examples_are_read(kind, record):
    [found] = READ[kind]([record])
    if kind == "demonstrations":
        assert found.completion.strip() == ANSWER
    elif kind == "comparisons":
        best = found.completions[found.ranks.index(1)].strip()
        assert best == ANSWER or (found.prompt, best) == ("The sky is", "blue.")
    if kind in ("demonstrations", "comparisons"):
        [prompt] = read_prompts([record])
        assert prompt.prompt == found.prompt


@pytest.mark.parametrize(("name", "kind", "code"), CONVERSIONS)
def test_conversions_make_what_is_read(tmp_path, monkeypatch, name, kind, code):
    with pytest.raises(DataError, match=r"docs/data\.md|every comparison"):
        READ[kind](FOREIGN[name])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(FOREIGN[name]))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    [path] = tmp_path.iterdir()
    found = READ[kind](path)
    asked = found[0].prompt if isinstance(found[0].prompt, str) else found[0].prompt[-1]["content"]
    assert asked in (ASKED, "Add the numbers.\n\n2 and 2")
    if kind == "demonstrations":
        assert found[0].completion == ANSWER
        assert len(found) == (1 if name == "unpaired" else len(FOREIGN[name]))
        assert [record.completion for record in found[1:]] == ["Blue."] * (len(found) - 1)
    else:
        [record] = found
        assert (record.completions, record.ranks) == ((ANSWER, "5."), (1, 2))


def test_every_foreign_example_has_a_conversion():
    assert sorted(FOREIGN) == sorted(name for name, _, _ in CONVERSIONS)
    assert {kind for kind, _ in EXAMPLES if kind in READ} == set(READ)
