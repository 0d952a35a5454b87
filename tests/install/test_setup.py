"""What the build decides by itself, and what it records of a part that failed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from environments import ROOT
from setuptools import Distribution


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location(f"rlhf_kernels_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch):
    for name in (
        "RLHF_KERNELS_BUILD_CUDA", "RLHF_KERNELS_REQUIRE", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME", "MAX_JOBS"
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return load("setup", monkeypatch)


@pytest.fixture
def backend(monkeypatch):
    return load("build_backend", monkeypatch)


@pytest.fixture
def nvcc(tmp_path):
    """An nvcc that knows Ampere, Hopper and the first Blackwell, and compiles nothing."""
    path = tmp_path / "nvcc"
    path.write_text(
        "#!/bin/sh\n[ $1 = --list-gpu-arch ] && printf 'compute_80\\ncompute_86\\ncompute_90\\ncompute_100\\n'\n"
    )
    path.chmod(0o755)
    return str(path)


def make_torch(folder, version, cuda=None):
    """A folder that looks like a torch package from outside."""
    (folder / "include" / "torch" / "csrc").mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n")
    (folder / "__init__.py").write_text("raise ImportError('it is only to be read')\n")
    return folder


@pytest.fixture
def command(setup, tmp_path):
    result = setup.CMakeBuild(Distribution({"name": "rlhf-kernels", "version": "0"}))
    result.build_temp, result.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    result.ensure_finalized()
    return result


def test_what_an_nvcc_does_not_know_is_left_out_and_an_error_if_asked_for(setup, nvcc, monkeypatch):
    assert setup.architectures(nvcc) == "80-real;86-real;90a-real;100-real"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;10.0+PTX 9.0a")
    assert setup.architectures(nvcc) == "86-real;100-real;100-virtual;90a-real"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 12.0")
    with pytest.raises(setup.BuildError, match=r"has '12.0', must be what this nvcc knows: compute_80"):
        setup.architectures(nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;Hopper")
    with pytest.raises(setup.BuildError, match=r"has 'Hopper', must be versions such as 8.0 or 12.0") as error:
        setup.architectures(nvcc)
    assert "TORCH_CUDA_ARCH_LIST" in error.value.remedy


def test_cuda_is_built_where_it_can_be_used_or_is_asked_for(setup, command, nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", nvcc)
    torches = {
        has: make_torch(tmp_path / str(has) / "torch", "2.14.1", "13.0" if has else None) for has in (True, False)
    }
    for has_cuda, folder in torches.items():
        monkeypatch.setattr(setup, "find_torch", lambda folder=folder: folder)
        monkeypatch.delenv("RLHF_KERNELS_BUILD_CUDA", raising=False)
        assert (command.unwanted() is None) == has_cuda
        for asked in ("0", "1"):
            monkeypatch.setenv("RLHF_KERNELS_BUILD_CUDA", asked)
            assert (command.unwanted() is None) == (asked == "1")
    monkeypatch.delenv("RLHF_KERNELS_BUILD_CUDA")
    assert str(command.unwanted()) == "this was built with torch 2.14.1, which has no CUDA"
    monkeypatch.setenv("RLHF_KERNELS_REQUIRE", " cuda , cpu")
    assert command.unwanted() is None
    monkeypatch.setenv("RLHF_KERNELS_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="RLHF_KERNELS_BUILD_CUDA: is 'yes', must be 0 or 1"):
        command.unwanted()
    monkeypatch.delenv("RLHF_KERNELS_BUILD_CUDA")
    monkeypatch.delenv("RLHF_KERNELS_REQUIRE")
    monkeypatch.setattr(setup, "find_torch", lambda: torches[True])
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert str(command.unwanted()) == "there was no nvcc when this was built"


def test_what_failed_is_kept_with_its_reason_and_the_rest_is_left(setup, command, monkeypatch, tmp_path, capsys):
    def built():
        command.files("cpu")[1].write_text("a library")

    monkeypatch.setattr(command, "build_cpu", built)
    monkeypatch.setenv("RLHF_KERNELS_BUILD_CUDA", "1")
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    torch = make_torch(tmp_path / "torch", "2.13.0+cpu")
    monkeypatch.setattr(setup, "find_torch", lambda: torch)
    command.run()
    said = capsys.readouterr().err
    kept = json.loads((tmp_path / "lib" / "rlhf_kernels" / "_build.json").read_text())
    assert kept["torch"] == "2.13.0+cpu"
    assert list(kept["missing"]) == ["cuda"]
    reason, remedy = kept["missing"]["cuda"]["reason"], kept["missing"]["cuda"]["remedy"]
    assert "/nowhere/nvcc" in reason
    assert said == f"rlhf-kernels: cuda was not built: {reason}\n  Without it ops on a GPU run on Triton.\n  {remedy}\n"
    assert [Path(name).name for name in command.get_outputs()] == ["_ops.so", "_build.json"]


def test_a_tool_that_fails_is_quoted(setup, command, tmp_path, capsys):
    with (tmp_path / "log").open("w") as log, pytest.raises(setup.BuildError) as error:
        command.stream(
            "compiling", [sys.executable, "-c", "print('[1/2] Building'); print('x.cu: error: no'); exit(3)"], log
        )
    assert str(error.value) == "compiling: x.cu: error: no"
    assert capsys.readouterr().out == "rlhf-kernels: [1/2] Building\nx.cu: error: no\n\n"
    assert (tmp_path / "log").read_text() == "[1/2] Building\nx.cu: error: no\n"
    with (tmp_path / "log").open("w") as log, pytest.raises(setup.BuildError, match=r"compiling: .* ended with 3"):
        command.stream("compiling", [sys.executable, "-c", "exit(3)"], log)
    latin = "import sys; sys.stdout.buffer.write(b'x.cpp:1: error: na\\xefve\\n'); exit(1)"
    with (tmp_path / "log").open("w") as log, pytest.raises(setup.BuildError, match=r"x.cpp:1: error: na.ve"):
        command.stream("compiling", [sys.executable, "-c", latin], log)


def test_what_is_asked_for_wrongly_is_said_before_anything_is_built(setup, command, monkeypatch):
    monkeypatch.setattr(command, "build_cpu", lambda: pytest.fail("was built"))
    wrong = {
        "RLHF_KERNELS_BUILD_CUDA": ("yes", "RLHF_KERNELS_BUILD_CUDA: is 'yes', must be 0 or 1"),
        "MAX_JOBS": ("0", "MAX_JOBS: is '0', must be a number from 1 on"),
        "RLHF_KERNELS_REQUIRE": ("cuda", "RLHF_KERNELS_REQUIRE asks for cuda, but there is no nvcc on the path"),
    }
    monkeypatch.setattr(setup, "nvcc", lambda: None)
    for name, (value, complaint) in wrong.items():
        monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match=complaint):
            command.run()
        monkeypatch.delenv(name)


def test_whoever_names_a_toolkit_gets_its_nvcc(setup, nvcc, monkeypatch, tmp_path):
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    other = tmp_path / "toolkit" / "bin" / "nvcc"
    other.symlink_to(nvcc)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.nvcc() == nvcc
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert setup.nvcc() == str(other)
    monkeypatch.setenv("CUDACXX", "/some/nvcc")
    assert setup.nvcc() == "/some/nvcc"


@pytest.mark.parametrize(
    ("output", "reason", "remedy"),
    [
        (
            "CMake Error at x:1:\n  [1/2] nvcc\n\n  nvcc fatal   : Unsupported gpu architecture 'compute_70'\n\n",
            "nvcc fatal : Unsupported gpu architecture 'compute_70'",
            "install CUDA 12 or newer",
        ),
        (
            "-- hm\nCMake Error at CMakeLists.txt:3 (project):\n  No CMAKE_CXX_COMPILER could be found.\n\n"
            "  Tell CMake where\n",
            "No CMAKE_CXX_COMPILER could be found.",
            "install a C++20 compiler",
        ),
        (
            "CMake Error at x.cmake:1 (message):\n  The C++ compiler\n\n    c++\n\n"
            "  is not able to compile a simple test program.\n\n  It fails with the following output:\n\n"
            "    Dir\n    /usr/bin/ld: cannot find -lx\n    ld error: 1\n",
            "The C++ compiler c++ is not able to compile a simple test program. /usr/bin/ld: cannot find -lx",
            "have CXX, CXXFLAGS and LDFLAGS name what works",
        ),
        (
            "CMake Error at x.cmake:1 (message):\n"
            "  Could not find the compiler specified in the environment variable CXX:\n\n    gcc-99.\n",
            "Could not find the compiler specified in the environment variable CXX: gcc-99.",
            "have CXX, CXXFLAGS and LDFLAGS name what works",
        ),
        (
            "c++: fatal error: Killed signal terminated program cc1plus\n",
            "c++: fatal error: Killed signal terminated program cc1plus",
            "the memory was not enough: MAX_JOBS=1",
        ),
        (
            "a.cpp:1: error: unclear\nfatal error: error writing to /tmp/a.s: No space left on device\n",
            "fatal error: error writing to /tmp/a.s: No space left on device",
            "make room on the disk",
        ),
        (
            "CMake Error at F.cmake:2 (message):\n  Could NOT find Python (missing: Development.Module)\n\n",
            "Could NOT find Python (missing: Development.Module)",
            "install Python's headers",
        ),
        ("a.cpp:1:2: error: 'x' was not declared\n", "a.cpp:1:2: error: 'x' was not declared", "pip install -v"),
    ],
)
def test_the_reason_is_the_first_error_and_has_its_remedy(setup, output, reason, remedy):
    assert setup.first_error(output) == reason
    assert setup.BuildError(reason).remedy.startswith(remedy)


def test_compilers_at_a_time_are_bounded(setup, monkeypatch):
    assert setup.jobs() >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="MAX_JOBS: is 'many', must be a number from 1 on"):
        setup.jobs()


def test_an_isolated_build_brings_torch_only_where_there_is_none(backend, monkeypatch, tmp_path):
    """Pip hides the environment's packages, uv builds in an environment of its own."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: ["ninja"])
    assert backend.find_torch() is None
    assert backend.get_requires_for_build_wheel() == ["ninja", "torch>=2.10"]
    old = make_torch(tmp_path / "torch", "2.9.1")
    assert backend.find_torch() == old
    assert backend.get_requires_for_build_wheel() == ["ninja", "torch>=2.10"]
    new = make_torch(tmp_path / "user" / "torch", "2.13.0+cu130", "13.0")
    assert backend.find_torch() == new
    assert backend.version_of(new) == ("2.13.0+cu130", True)
    assert backend.get_requires_for_build_wheel() == ["ninja"]


def test_an_environment_that_sees_the_systems_packages_has_its_torch(backend, monkeypatch, tmp_path):
    system = make_torch(tmp_path / "system" / "torch", "2.13.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        backend.sysconfig, "get_path", lambda name, vars=None: str(tmp_path / ("system" if vars else "own"))
    )
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(backend.sys, "prefix", str(tmp_path))
    for said, found in (("false", None), ("true", system)):
        (tmp_path / "pyvenv.cfg").write_text(f"home = /usr\ninclude-system-site-packages = {said}\n")
        assert backend.find_torch() == found


def test_a_torch_that_is_too_old_is_named(setup, command, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "find_torch", lambda: make_torch(tmp_path / "torch", "2.9.1"))
    with pytest.raises(setup.BuildError, match=r"torch 2.9.1, to build with, is too old: the kernels need 2.10"):
        command.cmake("cpu")


def test_the_oldest_torch_is_the_same_everywhere(backend):
    assert f'dependencies = ["torch>={backend.OLDEST_TORCH}"]' in (ROOT / "pyproject.toml").read_text()
    major, minor = map(int, backend.OLDEST_TORCH.split("."))
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in (ROOT / "CMakeLists.txt").read_text()
