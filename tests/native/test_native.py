"""The tests in C++, through ctest."""

import subprocess
from pathlib import Path

import pytest
from native_build import build, build_for_aarch64, missing_for_aarch64, tool


def hold(folder: Path):
    done = subprocess.run(
        [tool("ctest"), "--test-dir", str(folder), "--output-on-failure"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed" in done.stdout


def test_what_all_native_kernels_share():
    folder = build()
    if folder is None:
        pytest.skip("no C++ compiler, CMake or Ninja here")
    hold(folder)


def test_the_same_on_64_bit_arm():
    """Without the kernels themselves, which `make test-aarch64` runs."""
    if missing := missing_for_aarch64():
        pytest.skip(missing)
    hold(build_for_aarch64())
