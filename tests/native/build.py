"""Builds what CMakeLists.txt beside this file says: the tests in C++, and csrc/cuda for the CPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


FOLDER = ROOT / "build" / "native_tests"


def tool(name: str) -> str | None:
    """Where a program is: beside this Python, or on the path."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def build() -> Path | None:
    """The folder with what was built, anew where its sources have changed; None where there is no compiler for it.

    Raises:
        RuntimeError: it does not compile.
    """
    cmake, ninja = tool("cmake"), tool("ninja")
    if not cmake or not ninja or not any(map(tool, ("c++", "g++", "clang++"))):
        return None
    torch_folder = Path(torch.__file__).parent
    configure = [
        cmake, "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DRLHF_KERNELS_TESTS=ON", f"-DTORCH_INCLUDE_DIR={torch_folder / 'include'}",
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", str(FOLDER)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the native tests were not built:\n{done.stdout}{done.stderr}")
    return FOLDER
