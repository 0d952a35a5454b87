"""Builds the targets of the CMakeLists.txt beside this file: the tests in C++, and csrc/cuda for the CPU."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


FOLDER = ROOT / "build" / "native_tests"
AARCH64_FOLDER = ROOT / "build" / "native_tests_aarch64"
TOOLCHAIN = f"-DCMAKE_TOOLCHAIN_FILE={Path(__file__).with_name('aarch64.cmake')}"


def tool(name: str) -> str | None:
    """Where a program is: beside this Python, or on the path."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def build() -> Path | None:
    """The folder with the build, which is brought up to date first; None if there is no compiler, CMake or Ninja.

    Raises:
        RuntimeError: it does not compile.
    """
    if not all(map(tool, ("cmake", "ninja"))) or not any(map(tool, ("c++", "g++", "clang++"))):
        return None
    cmake(FOLDER, "-DRLHF_KERNELS_TESTS=ON")
    return FOLDER


def missing_for_aarch64() -> str | None:
    """Which Debian packages are missing to compile for 64-bit Arm and to run the result; None if all are there."""
    packages = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
    packages |= {"cmake": "cmake", "ninja": "ninja-build"}
    lacking = [package for program, package in packages.items() if not tool(program)]
    return f"for 64-bit Arm install {' '.join(lacking)}" if lacking else None


def build_for_aarch64() -> Path:
    """The folder with the tests in C++, compiled for 64-bit Arm.

    Raises:
        RuntimeError: they do not compile.
    """
    cmake(AARCH64_FOLDER, TOOLCHAIN, "-DRLHF_KERNELS_TESTS=ON", targets=("math_test", "vec_test_neon"))
    return AARCH64_FOLDER


def cmake(folder: Path, *options: str, targets: tuple[str, ...] = ("all",)) -> None:
    """Configures and builds.

    Raises:
        RuntimeError: with all that CMake and the compiler said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of pytest's processes builds, and the others wait
        run_cmake(folder, options, targets)


def run_cmake(folder: Path, options: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """The work of :func:`cmake`, with the folder locked."""
    program = tool("cmake")
    configure = [
        program, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DTORCH_INCLUDE_DIR={Path(torch.__file__).parent / 'include'}", *options,
    ]  # fmt: skip
    for command in (configure, [program, "--build", str(folder), "--target", *targets]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{folder.name} was not built:\n{done.stdout}{done.stderr}")
