"""The examples of docs/integrations.md run as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def test_every_section_has_one():
    assert list(EXAMPLES) == re.findall(r"^## (.*)$", PAGE, re.MULTILINE)


# What an example needs, and whether it patches a library and prints that.
NEEDS = {
    "transformers": ("transformers", False),
    "TRL": ("trl", True),
    "verl": ("verl.trainer.ppo.core_algos", True),
    "OpenRLHF": ("openrlhf.models", True),
    "Tensor parallelism": ("torch.distributed", False),
}


@pytest.mark.parametrize("section", EXAMPLES)
def test_example(section, capsys):
    module, prints = NEEDS[section]
    pytest.importorskip(module, exc_type=ImportError)
    exec(compile(EXAMPLES[section], f"docs/integrations.md, {section}", "exec"), {})
    if prints:
        assert f"rlhf_kernels in {section.lower()}" in capsys.readouterr().out
