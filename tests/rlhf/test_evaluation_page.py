"""docs/evaluation.md: its commands are ones that the command line takes, and its tasks are lm-eval's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rlhf import cli

PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
COMMANDS = [
    shlex.split(line)[1:]
    for body in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in body.splitlines()
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[-1])
def test_commands(words):
    stage, settings = cli.parse(words)
    assert settings is not None
    options = {name: settings.pop(name, None) for name in cli.OPTIONS.get(stage, {})}
    config = cli.STAGES[stage][0](**settings)
    assert config.output_dir.startswith("runs/")
    assert options.keys() <= {"resume", "export", "report"}


def test_every_finding_has_its_task():
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    named = {name for words in COMMANDS if "--tasks" in words for name in words[words.index("--tasks") + 1].split(",")}
    assert len(named) > 8
    assert named <= set(tasks.TaskManager().all_tasks)
