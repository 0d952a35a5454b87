"""Builds the native code through CMake and Ninja. A failure to do so never breaks the install: it is said, once.

Environment:
    RLHF_KERNELS_BUILD_CUDA: 1 builds the CUDA kernels, 0 does not; by default where nvcc is and torch has CUDA.
    TORCH_CUDA_ARCH_LIST: the GPUs to build for, as torch's own extensions take it: ``8.0;9.0a;12.0+PTX``.
    CUDACXX, CUDA_HOME: where nvcc is, if not on the path.
    MAX_JOBS: compilers at a time; by default one per core, and no more than fit the memory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# Ampere, Ada, Hopper, Blackwell; PTX of the last is compiled on whatever comes after.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX")
GIB_PER_JOB = 2


def first_error(output: str) -> str:
    """The first complaint of CMake (a header, then an indented paragraph) or of a compiler, on one line."""
    fatal = re.search(r"^.*\bnvcc fatal\b.*$", output, re.MULTILINE)  # CMake would quote all that went before it
    paragraph = re.search(r"^CMake Error.*\n((?:[ \t]+.*\n|\n)+)", output, re.MULTILINE)
    line = re.search(r"^.*\berror\b.*:.*$", output, re.MULTILINE | re.IGNORECASE)
    return " ".join((fatal[0] if fatal else paragraph[1] if paragraph else line[0] if line else output).split())


def nvcc() -> str | None:
    """The CUDA compiler, where there is one."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def architectures(compiler: str) -> str:
    """What CMake is told to compile for.

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST holds something that is no version, or none that this nvcc knows.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = []
    for entry in asked or ARCHITECTURES:
        version = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not version:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: has {entry!r}, must be versions such as 8.0 or 12.0+PTX")
        major, minor, suffix, ptx = version.groups()
        if f"compute_{major}{minor}" not in known:
            if asked:
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST: has {entry!r}, must be what this nvcc knows: {', '.join(known)}"
                )
            continue
        targets.append(f"{major}{minor}{suffix}-real")
        if ptx:
            targets.append(f"{major}{minor}{suffix}-virtual")
    return ";".join(targets)


def jobs() -> int:
    """How many compilers run at a time."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    return max(1, min(cores, int(available[1]) // (GIB_PER_JOB << 20) if available else cores))


class CMakeBuild(build_ext):
    """Configures, builds and installs the libraries where setuptools wants them."""

    def run(self) -> None:
        """Builds, or says why not and what is lost."""
        self.attempt(
            self.build_cpu,
            "the native code was not built",
            "The install goes on without it: ops run on the other backends, sequence packing in Python.",
            "To have it, install a C++20 compiler and `pip install cmake ninja pybind11`, then install again.",
        )
        if self.wants_cuda():
            self.attempt(
                self.build_cuda,
                "the CUDA kernels were not built",
                "The install goes on without them: on GPUs ops run on Triton.",
                "To have them, install CUDA 12 or newer with its nvcc, or name the GPUs that yours knows in "
                "TORCH_CUDA_ARCH_LIST, then install again; RLHF_KERNELS_BUILD_CUDA=0 does not try.",
            )

    def attempt(self, build: Callable[[], None], failure: str, loss: str, remedy: str) -> None:
        """Runs a part of the build that the install can do without."""
        try:
            build()
        except (subprocess.CalledProcessError, OSError, ImportError, ValueError) as error:
            reason = error.stderr if getattr(error, "stderr", None) else str(error)
            print(f"rlhf-kernels: {failure}: {reason}\n  {loss}\n  {remedy}", file=sys.stderr)

    def wants_cuda(self) -> bool:
        """Whether the CUDA kernels are asked for, or can be used here."""
        asked = os.environ.get("RLHF_KERNELS_BUILD_CUDA", "")
        if asked not in ("", "0", "1"):
            print(f"rlhf-kernels: RLHF_KERNELS_BUILD_CUDA: is {asked!r}, must be 0 or 1", file=sys.stderr)
        if asked in ("0", "1"):
            return asked == "1"
        try:
            import torch
        except ImportError:
            return False
        return torch.version.cuda is not None and nvcc() is not None

    def build_cpu(self) -> None:
        """Raises CalledProcessError, OSError or ImportError when a tool fails or is missing."""
        import pybind11

        self.cmake(
            "cpu",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRLHF_KERNELS_VERSION={self.distribution.get_version()}",
            f"-DRLHF_KERNELS_ASAN={os.environ.get('RLHF_KERNELS_ASAN', 'OFF')}",
        )

    def build_cuda(self) -> None:
        """Raises CalledProcessError, OSError, ImportError or ValueError likewise."""
        compiler = nvcc()
        if compiler is None:
            raise OSError("there is no nvcc on the path, nor where CUDACXX or CUDA_HOME say")
        self.cmake(
            "cuda",
            "-DRLHF_KERNELS_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={compiler}",
            f"-DCMAKE_CUDA_ARCHITECTURES={architectures(compiler)}",
        )

    def cmake(self, part: str, *options: str) -> None:
        """Builds one part in a folder of its own, which keeps all that the compilers said."""
        torch = importlib.util.find_spec("torch")  # its headers are all that is needed
        if torch is None or torch.origin is None:
            raise ImportError("there is no torch to build against")
        torch_folder = Path(torch.origin).parent
        destination = Path(self.get_ext_fullpath("rlhf_kernels._C")).resolve().parent
        build = Path(self.build_temp).resolve() / part
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options,
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DTORCH_INCLUDE_DIR={torch_folder / 'include'}",
        ]  # fmt: skip
        with (build / "build.log").open("w") as log:
            for command in (configure, ["cmake", "--build", str(build), "-j", str(jobs()), "--target", "install"]):
                self.stream(command, log)

    def stream(self, command: list[str], log: TextIO) -> None:
        """Runs a tool and shows how far it is; pip does so with -v."""
        # The venv's own cmake and ninja come before the system's, whether or not the venv is activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        said = []
        with subprocess.Popen(
            command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout:
                said.append(line)
                log.write(line)
                if line.startswith("["):
                    print(f"rlhf-kernels: {line}", end="", flush=True)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, stderr=first_error("".join(said)))

    def get_outputs(self) -> list[str]:
        """What was built, if it was."""
        return [path for path in super().get_outputs() if Path(path).exists()]


if __name__ == "__main__":
    setup(ext_modules=[Extension("rlhf_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
