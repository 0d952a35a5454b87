"""The command in an install of the ops alone."""

import importlib.metadata
import re
import subprocess
import sys

from rlhf.__main__ import TRAIN

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Blocked())
from rlhf.__main__ import main
sys.argv = ["rlhf", "sft", "--model", "gpt2", "--data", "none.jsonl", "--output_dir", "runs"]
sys.exit(main())
"""


def start(name):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(name=name)], capture_output=True, text=True, check=False
    )


def test_what_the_trainer_needs_is_named():
    for name in ("jsonargparse", "transformers"):
        done = start(name)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"rlhf: error: {name} is not installed: pip install 'rlhf-kernels[train]'\n"


def test_another_missing_module_is_an_error_of_its_own():
    done = start("torch")
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named torch" in done.stderr


def test_the_packages_are_those_of_the_extra():
    listed = importlib.metadata.requires("rlhf-kernels")
    names = {re.split(r"[^\w-]", line)[0].lower() for line in listed if 'extra == "train"' in line}
    assert {"yaml" if name == "pyyaml" else name for name in names} == TRAIN
