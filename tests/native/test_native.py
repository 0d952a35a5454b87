"""The tests in C++, through ctest."""

import subprocess

import pytest

from build import FOLDER, build, tool


def test_the_math_that_all_native_kernels_share():
    if build() is None:
        pytest.skip("no C++ compiler, CMake or Ninja here")
    done = subprocess.run(
        [tool("ctest"), "--test-dir", str(FOLDER), "--output-on-failure"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed" in done.stdout
