"""The command in an install of the ops alone."""

import importlib.metadata
import re
import subprocess
import sys

import pytest

from rlhf.__main__ import EVAL, LABEL, TRAIN

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Blocked())
from rlhf.__main__ import main
sys.argv = ["rlhf", *{words!r}]
sys.exit(main())
"""


def start(name, *words):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(name=name, words=words)], capture_output=True, text=True, check=False
    )


SFT = ["sft", "--model", "gpt2", "--data", "none.jsonl", "--output_dir", "runs"]


def test_what_a_command_needs_is_named():
    for name, extra, words in [
        ("jsonargparse", "train", SFT),
        ("transformers", "train", SFT),
        ("uvicorn", "label", ["label", "--output_dir", "runs"]),
    ]:
        done = start(name, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"rlhf: error: {name} is not installed: pip install 'rlhf-kernels[{extra}]'\n"


def test_another_missing_module_is_an_error_of_its_own():
    done = start("torch", *SFT)
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named torch" in done.stderr


@pytest.mark.parametrize(("extra", "packages"), [("train", TRAIN), ("label", LABEL), ("eval", EVAL)])
def test_the_packages_are_those_of_the_extra(extra, packages):
    listed = importlib.metadata.requires("rlhf-kernels")
    names = {re.split(r"[^\w-]", line)[0].lower() for line in listed if f'extra == "{extra}"' in line}
    assert {{"pyyaml": "yaml", "lm-eval": "lm_eval"}.get(name, name) for name in names} - {"rlhf-kernels"} == packages
