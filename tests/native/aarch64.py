"""Tests the native code for 64-bit Arm on another Debian machine: cross-compiled, and run by QEMU.

Runs first the tests in C++, then the kernel tests in an Arm Python with an Arm torch. Their packages are downloaded
once into build/aarch64 (200 MB): Debian's Python with an apt that has its own lists, and the rest with pip. Nothing is
installed on this machine. Arguments are passed to pytest in place of the tests that are chosen here.

    make test-aarch64
    .venv/bin/python tests/native/aarch64.py tests/kernels/test_gae.py -k cpu
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from native_build import ROOT, TOOLCHAIN, build_for_aarch64, cmake, missing_for_aarch64, tool

FOLDER = ROOT / "build" / "aarch64"
# The last torch whose Arm wheel is for CPUs only, 139 MiB. From 2.11 on the wheel has 400 MiB.
TORCH = "torch==2.10.0"
PACKAGES = ("numpy", "hypothesis", "pytest", "pytest-timeout")
TORCH_PACKAGES = ("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing_extensions")
TESTS = (
    "tests/kernels/test_layouts.py", "tests/kernels/test_accuracy.py", "tests/kernels/test_determinism.py",
    # The largest sizes are left out: QEMU needs minutes for what the reference does position by position.
    "-k", "(cpu or neon) and not 50257 and not 128256 and not 32768 and not more_pairs",
)  # fmt: skip


def once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills once. If a run is interrupted, the next one starts it again."""
    folder = FOLDER / name
    if not folder.exists():
        unfinished = folder.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def call(*command: str | Path, **options: str | Path | dict) -> None:
    """Runs a command that must succeed."""
    subprocess.run([str(part) for part in command], check=True, **options)


def unpack_python(folder: Path) -> None:
    """Debian's Python for 64-bit Arm, with the libraries that torch needs and the headers that pybind11 does."""
    lists, archives = folder / "lists", folder / "archives"
    for path in (lists / "partial", archives / "partial"):
        path.mkdir(parents=True)
    (folder / "status").touch()  # an empty list of what is installed
    apt = [
        "apt-get", "-qq", "-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64",
        "-o", f"Dir::State={folder}", "-o", f"Dir::State::status={folder / 'status'}", "-o", f"Dir::Cache={folder}",
        "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=",  # lock no system folder, run as no other user
    ]  # fmt: skip
    call(*apt, "update")
    call(*apt, "install", "--yes", "--download-only", "--no-install-recommends", "python3", "libstdc++6", "libgomp1")
    python = next(archives.glob("python3.[0-9]*-minimal_*")).name.split("-")[0]
    call(*apt, "download", f"lib{python}-dev", cwd=archives)
    for archive in archives.glob("*.deb"):
        call("dpkg-deb", "-x", archive, folder)
    for path in (lists, archives):
        shutil.rmtree(path)


def install_packages(folder: Path, version: str) -> None:
    """torch and what the tests need. torch's requirements are listed above: pip would choose this machine's."""
    pip = [
        sys.executable, "-m", "pip", "install", "-qq", "--target", folder, "--only-binary=:all:",
        *(f"--platform=manylinux{glibc}_aarch64" for glibc in ("2014", "_2_17", "_2_28")),
        f"--python-version={version}", "--implementation=cp",
    ]  # fmt: skip
    call(*pip, "--no-deps", TORCH)
    call(*pip, *TORCH_PACKAGES, *PACKAGES)


def main(arguments: list[str]) -> int:
    """Runs all of it, and returns what pytest does."""
    missing = missing_for_aarch64()
    if missing or not tool("apt-get"):
        print(f"make test-aarch64: {missing or 'needs apt-get, which Debian has'}", file=sys.stderr)
        return 1
    call(tool("ctest"), "--test-dir", build_for_aarch64(), "--output-on-failure")

    root = once("root", unpack_python)
    version = (root / "usr/bin/python3").resolve().name.removeprefix("python")
    packages = once(f"packages{version}", lambda folder: install_packages(folder, version))
    library = FOLDER / "library"
    package = library / "rlhf_kernels"
    shutil.rmtree(library, ignore_errors=True)
    shutil.copytree(ROOT / "rlhf_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    # The tests start further Pythons through this script. Nothing else is on the path: the compilers of this machine
    # are of no use to them.
    python = FOLDER / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(
        f'#!/bin/sh\nPATH="{python.parent}" PYTHONPATH="{library}:{packages}${{PYTHONPATH:+:$PYTHONPATH}}" '
        f'exec "{tool("qemu-aarch64")}" -L "{root}" -0 "{python}" "{root}/usr/bin/python3" "$@"\n'
    )
    python.chmod(0o755)

    import pybind11

    cmake(
        FOLDER / "cmake", TOOLCHAIN, f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_INCLUDE_DIR={root}/usr/include/python{version}", "-DRLHF_KERNELS_VERSION=0",
        f"-DCMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES={root}/usr/include",  # Debian has the real pyconfig.h under it
        f"-DCMAKE_INSTALL_PREFIX={package}", targets=("install",),
    )  # fmt: skip
    # Python must not take the package from the folder it is started in: nothing there is built for this processor.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}
    # Fails if the kernels do not load. The tests would run without them.
    call(python, "-m", "rlhf_kernels", env=environment | {"RLHF_KERNELS_BACKEND": "cpu", "RLHF_KERNELS_ISA": "neon"})
    tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=3600", *(arguments or TESTS)]
    return subprocess.run([str(part) for part in tests], env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
