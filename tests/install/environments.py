"""Fresh copies of the sources, fresh environments, and what an install in one of them has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD_TOOLS = ("setuptools>=77", "cmake>=3.18", "ninja", "pybind11>=2.13")

# One position: δ = r − V, and the return is r.
ONE_OP = """
import warnings
import torch
warnings.simplefilter("error")
import rlhf_kernels
advantages, returns = rlhf_kernels.masked_gae(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.ones(1, 1))
assert (advantages.item(), returns.item()) == (2.0, 3.0), (advantages, returns)
with rlhf_kernels.use_backend("cpu"):
    assert rlhf_kernels.kl_penalty(torch.ones(1), torch.zeros(1)).item() == 1
"""


def run(command: Iterable[object], cwd: Path, *, ok: bool | None = True, **environment: str) -> str:
    """Runs a command and returns its output. It must succeed (``ok``), fail (not ``ok``), or may do either (None).

    Variables that decide about a build are unset unless they are given. A variable given as "" is not set.
    """
    ours = ("RLHF_KERNELS_", "CMAKE_", "CUDA", "TORCH_CUDA_ARCH_LIST", "CXX", "LDFLAGS", "MAX_JOBS", "PYTHONPATH",
            "VIRTUAL_ENV", "TRITON_INTERPRET")  # fmt: skip
    variables = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    variables |= {name: value for name, value in environment.items() if value}
    variables["PIP_CONSTRAINT"] = os.devnull  # the machine's constraints would decide which torch is tried
    if "PIP_FIND_LINKS" in variables:
        variables.setdefault("UV_FIND_LINKS", variables["PIP_FIND_LINKS"])
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=variables, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ok is None or (done.returncode == 0) == ok, f"{command}: ended with {done.returncode}\n{done.stdout}"
    return done.stdout


def copy_sources(to: Path) -> Path:
    """The files of the checkout that git knows or would add, without whatever was built there."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def uv() -> str:
    """The path of uv, which is beside this Python."""
    return str(Path(sys.executable).with_name("uv"))


def environment(folder: Path, *packages: str) -> Path:
    """A new virtual environment with pip and these packages; returns its Python."""
    run([uv(), "venv", "--quiet", "--seed", "--python", sys.executable, folder], folder.parent)
    python = folder / "bin" / "python"
    if packages:
        run([uv(), "pip", "install", "--quiet", "--python", python, *packages], folder.parent)
    return python


def report(python: Path, cwd: Path, **variables: str) -> str:
    """What ``python -m rlhf_kernels`` says there."""
    return run([python, "-m", "rlhf_kernels"], cwd, **variables)


def torch_of(python: Path) -> list[str]:
    """The dist-info folder of the torch in an environment; empty if it has none."""
    return [path.name for path in python.parents[1].glob("lib/python*/site-packages/torch-*.dist-info")]


def assert_has_kernels(python: Path, cwd: Path) -> None:
    """Asserts that the CPU kernels are there and compute."""
    said = report(python, cwd)
    assert "backend       cpu: available, with " in said, said
    assert "native module: build Release, " in said, said
    run([python, "-c", ONE_OP], cwd)
