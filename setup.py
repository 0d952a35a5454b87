"""Builds the native code with CMake and Ninja, and records what was built in ``rlhf_kernels/_build.json``.

A part that can't be built does not break the install, since the package works without it. ``python -m rlhf_kernels``
says what is missing, why, and what would help. The first op on the CPU that misses its kernels warns of it, too.

Environment:
    RLHF_KERNELS_REQUIRE: parts without which the install must fail: ``cpu``, ``cuda`` or ``cpu,cuda``.
    RLHF_KERNELS_BUILD_CUDA: 1 builds the CUDA kernels, 0 does not. By default they are built if there is an nvcc and
        torch has CUDA.
    TORCH_CUDA_ARCH_LIST: the GPUs to build for, as torch's own extensions take it: ``8.0;9.0a;12.0+PTX``.
    CXX, CXXFLAGS, LDFLAGS: the C++ compiler and its options, as CMake takes them.
    CUDACXX, CUDA_HOME: the nvcc to use, or the toolkit that it is in. Without them it is the nvcc on the path, else the
        one in /usr/local/cuda.
    RLHF_KERNELS_ASAN: ON builds with the address sanitizer, as ``make asan`` does.
    MAX_JOBS: how many compilers run at a time; by default one per core, and no more than fit into memory.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # this file may be run from any folder

from build_backend import OLDEST_TORCH, find_torch, is_new_enough, version_of  # noqa: E402

# How tools are run: in English, and with an output that can be decoded whatever bytes a path or a source holds.
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "env": os.environ | {"LC_ALL": "C.UTF-8"}}

# Ampere, Ada, Hopper and Blackwell. GPUs that come later compile the PTX of the last.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX")
GIB_PER_JOB = 2

# What happens in an install without each part.
PARTS = {
    "cpu": "ops on the CPU run on the reference, sequence packing in Python",
    "cuda": "ops on a GPU run on Triton",
}
RECORD = "_build.json"
LONGEST_REASON = 600  # characters of what tools say
# Variables that CMake reads only at its first run in a folder, and then keeps.
TAKEN_BY_CMAKE = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX", "CUDAFLAGS", "CMAKE_CXX_COMPILER_LAUNCHER", "PATH")

BUILD_TOOLS = "pip install cmake ninja pybind11, or let pip do it: install without --no-build-isolation"
TORCH = f"pip install 'torch>={OLDEST_TORCH}', or let pip do it: install without --no-build-isolation"
CUDA = "install CUDA 12 or newer with its nvcc (CUDACXX or CUDA_HOME say where it is), then install again"
# What helps, by a pattern in what CMake or a compiler says. The first pattern that matches decides.
REMEDIES = {
    r"No space left": "make room on the disk, then install again",
    r"Killed": "the memory was not enough: MAX_JOBS=1 has one compiler at a time; then install again",
    r"nvcc|CUDA": CUDA,
    r"simple test program|variable CXX": "have CXX, CXXFLAGS and LDFLAGS name what works, then install again",
    r"CMAKE_CXX_COMPILER|CXX20": "install a C++20 compiler (Debian, Ubuntu: apt install g++), then this again",
    r"Could NOT find Python": "install Python's headers (Debian, Ubuntu: apt install python3-dev), then this again",
    r"": "pip install -v shows all that the compilers say",
}


class BuildError(Exception):
    """Why a part was not built, in the words of the tool that failed, and what would help."""

    def __init__(self, reason: str, remedy: str = ""):
        super().__init__(reason.rstrip("."))
        self.remedy = remedy or next(words for pattern, words in REMEDIES.items() if re.search(pattern, reason))


NO_NVCC = BuildError("there is no nvcc on the path, nor where CUDACXX or CUDA_HOME say", CUDA)


def refuse(part: str, failure: BuildError) -> NoReturn:
    """Ends the install, since this part is required."""
    raise SystemExit(f"rlhf-kernels: RLHF_KERNELS_REQUIRE asks for {part}, but {failure}\n  {failure.remedy}")


def first_error(output: str) -> str:
    """CMake's complaint (a header, then indented paragraphs) and a compiler's first error, both on one line."""
    full = re.search(r"^.*\bNo space left on device\b.*$", output, re.MULTILINE)  # then tools complain of other things
    fatal = re.search(r"^.*\bnvcc fatal\b.*$", output, re.MULTILINE)  # CMake quotes it after pages of other output
    if full or fatal:
        return " ".join((full or fatal)[0].split())
    complaint = re.search(r"^CMake Error.*\n((?:[ \t]+\S.*\n|\n)+)", output, re.MULTILINE)
    line = re.search(r"^(?!CMake Error).*(?:\berror\b.*:|/ld(?:\.\w+)?: ).*$", output, re.MULTILINE | re.IGNORECASE)
    # What follows these words is the whole output of a tool, or advice.
    said = re.split(r"It fails with the following output|Tell CMake where", complaint[1])[0] if complaint else ""
    found = " ".join(f"{said} {line[0] if line else ''}".split()) or " ".join(output.split())
    return found if len(found) <= LONGEST_REASON else f"{found[:LONGEST_REASON]} …"


def tool(name: str) -> str:
    """The path of cmake or ninja: from the Python package of that name, else the system's.

    Raises:
        BuildError: there is none.
    """
    try:
        package = importlib.import_module(name)
        folder = getattr(package, "CMAKE_BIN_DIR", None) or getattr(package, "BIN_DIR", None)
    except ImportError:
        folder = None
    found = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if not found:
        raise BuildError(f"there is no {name}", BUILD_TOOLS)
    return found


def nvcc() -> str | None:
    """The path of nvcc, or None. The variables come before the path, since whoever sets one means it."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin", None] if home else [None, "/usr/local/cuda/bin"]
    return os.environ.get("CUDACXX") or next(filter(None, (shutil.which("nvcc", path=path) for path in places)), None)


def ask_nvcc(compiler: str, step: str, *arguments: str, cwd: Path | None = None) -> str:
    """Runs nvcc, and returns what it prints.

    Raises:
        BuildError: it fails; names the step and quotes nvcc.
    """
    done = subprocess.run([compiler, *arguments], capture_output=True, cwd=cwd, check=False, **TEXT)
    if done.returncode:
        said = first_error(done.stderr + done.stdout) or f"it ended with {done.returncode}"
        raise BuildError(f"{step}: {said}", CUDA)
    return done.stdout


def architectures(compiler: str) -> str:
    """The value of CMAKE_CUDA_ARCHITECTURES.

    Raises:
        BuildError: nvcc does not run, or TORCH_CUDA_ARCH_LIST holds what is no version, or none that nvcc knows.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    other = "set TORCH_CUDA_ARCH_LIST otherwise, or not at all, then install again"
    step = f"asking nvcc ({compiler}) for the GPUs it knows"
    known = ask_nvcc(compiler, step, "--list-gpu-arch").split()
    if not known:
        raise BuildError(f"{step}: it names none", CUDA)
    targets = []
    for entry in asked or ARCHITECTURES:
        version = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not version:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: has {entry!r}, must be versions such as 8.0 or 12.0+PTX", other)
        major, minor, suffix, ptx = version.groups()
        if f"compute_{major}{minor}" not in known:
            if asked:
                reason = f"TORCH_CUDA_ARCH_LIST: has {entry!r}, must be what this nvcc knows: {', '.join(known)}"
                raise BuildError(reason, other)
            continue
        targets.append(f"{major}{minor}{suffix}-real")
        if ptx:
            targets.append(f"{major}{minor}{suffix}-virtual")
    return ";".join(targets)


def try_nvcc(compiler: str, folder: Path) -> None:
    """Compiles an empty program. CMake does that too, but does not pass on what nvcc says.

    Raises:
        BuildError: nvcc fails; quotes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "try.cu").write_text("int main() {}\n")
    host = ["-ccbin", os.environ["CUDAHOSTCXX"]] if os.environ.get("CUDAHOSTCXX") else []
    ask_nvcc(compiler, f"trying nvcc ({compiler})", *host, "-c", "try.cu", "-o", "try.o", cwd=folder)


def jobs() -> int:
    """How many compilers run at a time."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise SystemExit(f"rlhf-kernels: MAX_JOBS: is {asked!r}, must be a number from 1 on")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    return max(1, min(cores, int(available[1]) // (GIB_PER_JOB << 20) if available else cores))


def required() -> set[str]:
    """The parts that RLHF_KERNELS_REQUIRE names."""
    names = {name.strip() for name in os.environ.get("RLHF_KERNELS_REQUIRE", "").split(",")} - {""}
    for name in sorted(names - set(PARTS)):
        raise SystemExit(f"rlhf-kernels: RLHF_KERNELS_REQUIRE: has {name!r}, must be of {', '.join(PARTS)}")
    return names


def forget(build: Path) -> None:
    """Makes CMake look for compilers again, since they may have changed or been repaired. Keeps what was compiled."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for folder in (build / "CMakeFiles").glob("[0-9]*"):
        shutil.rmtree(folder, ignore_errors=True)


class CMakeBuild(build_ext):
    """Configures, builds and installs the libraries where setuptools wants them."""

    def run(self) -> None:
        """Builds each part, or records why it was not built."""
        needed = required()
        jobs()  # so that a bad MAX_JOBS is an error now, and not after minutes
        unwanted = self.unwanted()
        if "cuda" in needed and (unwanted or nvcc() is None):
            refuse("cuda", unwanted or NO_NVCC)
        self.destination.mkdir(parents=True, exist_ok=True)
        missing = {}
        for part, build in (("cpu", self.build_cpu), ("cuda", self.build_cuda)):
            for path in self.files(part):  # a file of an earlier build would pass for this one's
                path.unlink(missing_ok=True)
            failure = unwanted if part == "cuda" and unwanted else self.attempt(part, build)
            if failure:
                missing[part] = {"reason": str(failure), "remedy": failure.remedy}
                self.keep(missing)
                if part in needed:
                    refuse(part, failure)
        self.keep(missing)

    def keep(self, missing: dict[str, dict[str, str]]) -> None:
        """Writes the record: the torch that was built with, and the parts that are missing."""
        torch = find_torch()
        record = {"torch": version_of(torch)[0] if torch else None, "missing": missing}
        unfinished = self.destination / f"{RECORD}.unfinished"
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.destination / RECORD)

    @property
    def destination(self) -> Path:
        """The package's folder, where the libraries go."""
        return Path(self.get_ext_fullpath("rlhf_kernels._C")).resolve().parent

    def files(self, part: str) -> list[Path]:
        """The files of a part, once it is built."""
        names = (Path(self.get_ext_filename("_C")).name, "_ops.so") if part == "cpu" else ("_cuda.so",)
        return [self.destination / name for name in names]

    def attempt(self, part: str, build: Callable[[], None]) -> BuildError | None:
        """Runs a part of the build. Returns why it failed, or None; the install goes on without it."""
        try:
            build()
            return None
        except BuildError as error:
            failure = error
        except OSError as error:
            failure = BuildError(str(error))
        if "No space left" in str(failure):  # makes room for the rest of the install
            shutil.rmtree(Path(self.build_temp) / part, ignore_errors=True)
        print(
            f"rlhf-kernels: {part} was not built: {failure}\n  Without it {PARTS[part]}.\n  {failure.remedy}",
            file=sys.stderr,
        )
        return failure

    def unwanted(self) -> BuildError | None:
        """Why the CUDA kernels are not to be built. None if they are: because they are asked for, or of use here."""
        asked = os.environ.get("RLHF_KERNELS_BUILD_CUDA", "")
        if asked not in ("", "0", "1"):
            raise SystemExit(f"rlhf-kernels: RLHF_KERNELS_BUILD_CUDA: is {asked!r}, must be 0 or 1")
        if asked == "0":
            return BuildError("RLHF_KERNELS_BUILD_CUDA was 0 when this was built", "install again without it")
        if asked == "1" or "cuda" in required():
            return None
        torch = find_torch()
        if torch and not version_of(torch)[1]:
            reason = f"this was built with torch {version_of(torch)[0]}, which has no CUDA"
            return BuildError(
                reason, "install a torch with CUDA, then this again; RLHF_KERNELS_BUILD_CUDA=1 builds them anyway"
            )
        return None if nvcc() else BuildError("there was no nvcc when this was built", CUDA)

    def build_cpu(self) -> None:
        """Builds the CPU part. Raises BuildError or OSError when a tool fails or is missing."""
        try:
            import pybind11
        except ImportError:
            raise BuildError("there is no pybind11", BUILD_TOOLS) from None
        self.cmake(
            "cpu",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRLHF_KERNELS_VERSION={self.distribution.get_version()}",
            f"-DRLHF_KERNELS_ASAN={os.environ.get('RLHF_KERNELS_ASAN', 'OFF')}",
        )

    def build_cuda(self) -> None:
        """Builds the CUDA part. Raises as :meth:`build_cpu` does."""
        compiler = nvcc()
        if compiler is None:
            raise NO_NVCC
        targets = architectures(compiler)
        try_nvcc(compiler, Path(self.build_temp) / "cuda")
        self.cmake(
            "cuda",
            "-DRLHF_KERNELS_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={compiler}",
            f"-DCMAKE_CUDA_ARCHITECTURES={targets}",
        )

    def cmake(self, part: str, *options: str) -> None:
        """Builds one part in its own folder, whose build.log keeps all that the compilers said."""
        torch = find_torch()
        if torch is None:
            raise BuildError("there is no torch to build with", TORCH)
        version, _ = version_of(torch)
        if not is_new_enough(version):
            raise BuildError(
                f"torch {version}, to build with, is too old: the kernels need {OLDEST_TORCH} or newer", TORCH
            )
        build = Path(self.build_temp).resolve() / part
        build.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options,
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_INSTALL_PREFIX={self.destination}",
            f"-DTORCH_INCLUDE_DIR={torch / 'include'}",
        ]  # fmt: skip
        surroundings = build / "surroundings.json"
        given = json.dumps({name: os.environ.get(name) for name in TAKEN_BY_CMAKE})
        if not surroundings.exists() or surroundings.read_text(encoding="utf-8") != given:
            forget(build)
        surroundings.write_text(given, encoding="utf-8")
        with (build / "build.log").open("w", encoding="utf-8", buffering=1) as log:
            try:
                self.stream("configuring", configure, log)
                self.stream("compiling", [cmake, "--build", str(build), "-j", str(jobs()), "--target", "install"], log)
            except BuildError:
                forget(build)
                raise

    def stream(self, step: str, command: list[str], log: TextIO) -> None:
        """Runs a tool and prints its progress, and all its output if it fails. pip shows this with -v."""
        said = []
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **TEXT) as process:
                for line in process.stdout:
                    said.append(line)
                    log.write(line)
                    if line.startswith("["):
                        print(f"rlhf-kernels: {line}", end="", flush=True)
        except OSError as error:  # when a disk is full, writing the log is often what fails first
            raise BuildError(f"{step}: {error}") from None
        if process.returncode:
            print("".join(line for line in said if not line.startswith("[")), flush=True)
            raise BuildError(f"{step}: {first_error(''.join(said)) or f'{command[0]} ended with {process.returncode}'}")

    def there(self) -> list[Path]:
        """The files that were built, and the record."""
        files = [path for part in PARTS for path in self.files(part)]
        return [path for path in (*files, self.destination / RECORD) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """For an editable install: where a wheel would have each file, and where it is."""
        package = Path(self.build_lib) / "rlhf_kernels"
        return {str(package / path.name): str(path) for path in self.there()} if self.inplace else {}

    def get_outputs(self) -> list[str]:
        """Where a wheel has each file."""
        return list(self.get_output_mapping()) if self.inplace else [str(path) for path in self.there()]


if __name__ == "__main__":
    setup(ext_modules=[Extension("rlhf_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
