"""Builds the native code through CMake and Ninja. A failure to do so never breaks the install: it is said, once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def first_error(output: str) -> str:
    """The first complaint of CMake (a header, then an indented paragraph) or of a compiler, on one line."""
    paragraph = re.search(r"^CMake Error.*\n((?:[ \t]+.*\n|\n)+)", output, re.MULTILINE)
    line = re.search(r"^.*\berror:.*$", output, re.MULTILINE | re.IGNORECASE)
    return " ".join((paragraph[1] if paragraph else line[0] if line else output).split())


class CMakeBuild(build_ext):
    """Configures, builds and installs ``_C`` and ``_ops`` where setuptools wants them."""

    def run(self) -> None:
        """Builds, or says why not and what is lost."""
        try:
            self.build_with_cmake()
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            reason = error.stderr if getattr(error, "stderr", None) else str(error)
            print(
                f"rlhf-kernels: the native code was not built: {reason}\n"
                "  The install goes on without it: ops run on the other backends, sequence packing in Python.\n"
                "  To have it, install a C++20 compiler and `pip install cmake ninja pybind11`, then install again.",
                file=sys.stderr,
            )

    def build_with_cmake(self) -> None:
        """Raises CalledProcessError, OSError or ImportError when a tool fails or is missing."""
        import pybind11
        import torch

        torch_folder = Path(torch.__file__).parent
        destination = Path(self.get_ext_fullpath("rlhf_kernels._C")).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRLHF_KERNELS_VERSION={self.distribution.get_version()}",
            f"-DTORCH_INCLUDE_DIR={torch_folder / 'include'}",
            f"-DTORCH_LIBRARY_DIR={torch_folder / 'lib'}",
            f"-DRLHF_KERNELS_ASAN={os.environ.get('RLHF_KERNELS_ASAN', 'OFF')}",
        ]  # fmt: skip
        # The venv's own cmake and ninja come before the system's, whether or not the venv is activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        for command in (configure, ["cmake", "--build", str(build), "--target", "install"]):
            done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
            if done.returncode:
                done.stderr = first_error(done.stderr + done.stdout)
                done.check_returncode()

    def get_outputs(self) -> list[str]:
        """What was built, if it was."""
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(ext_modules=[Extension("rlhf_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
