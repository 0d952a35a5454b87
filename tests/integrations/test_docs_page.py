"""The examples of docs/integrations.md run as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
EXAMPLES = dict(re.findall(r"^## (\w+)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def test_every_section_has_one():
    assert list(EXAMPLES) == re.findall(r"^## (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("library", EXAMPLES)
def test_example(library, capsys):
    module = {"verl": "verl.trainer.ppo.core_algos", "OpenRLHF": "openrlhf.models", "TRL": "trl"}.get(library, library)
    pytest.importorskip(module, exc_type=ImportError)
    exec(compile(EXAMPLES[library], f"docs/integrations.md, {library}", "exec"), {})
    if library != "transformers":
        assert f"rlhf_kernels in {library.lower()}" in capsys.readouterr().out
