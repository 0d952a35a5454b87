"""What the install decides for itself, and what it says when a part of it fails."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch):
    for name in ("RLHF_KERNELS_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("rlhf_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(tmp_path):
    """One that knows Ampere, Hopper and an early Blackwell, and compiles nothing."""
    path = tmp_path / "nvcc"
    path.write_text(
        "#!/bin/sh\n[ $1 = --list-gpu-arch ] && printf 'compute_80\\ncompute_86\\ncompute_90\\ncompute_100\\n'\n"
    )
    path.chmod(0o755)
    return str(path)


def build(setup, tmp_path):
    command = setup.CMakeBuild(Distribution({"name": "rlhf-kernels", "version": "0"}))
    command.build_temp, command.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    command.ensure_finalized()
    return command


def test_what_an_nvcc_does_not_know_is_left_out_and_an_error_if_asked_for(setup, nvcc, monkeypatch):
    assert setup.architectures(nvcc) == "80-real;86-real;90a-real;100-real"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;10.0+PTX 9.0a")
    assert setup.architectures(nvcc) == "86-real;100-real;100-virtual;90a-real"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 12.0")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: has '12.0', must be what this nvcc knows: compute_80"):
        setup.architectures(nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;Hopper")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: has 'Hopper', must be versions such as 8.0 or 12.0"):
        setup.architectures(nvcc)


def test_cuda_is_built_where_it_can_be_used_or_is_forced(setup, nvcc, monkeypatch, tmp_path, capsys):
    command = build(setup, tmp_path)
    monkeypatch.setenv("CUDACXX", nvcc)
    for has_cuda in (None, "13.0"):
        monkeypatch.setattr(torch.version, "cuda", has_cuda)
        monkeypatch.delenv("RLHF_KERNELS_BUILD_CUDA", raising=False)
        assert command.wants_cuda() == bool(has_cuda)
        for asked in ("0", "1"):
            monkeypatch.setenv("RLHF_KERNELS_BUILD_CUDA", asked)
            assert command.wants_cuda() == (asked == "1")
    monkeypatch.setenv("RLHF_KERNELS_BUILD_CUDA", "yes")
    assert command.wants_cuda()
    assert "RLHF_KERNELS_BUILD_CUDA: is 'yes', must be 0 or 1" in capsys.readouterr().err


def test_a_failed_cuda_build_says_why_and_leaves_the_rest(setup, monkeypatch, tmp_path, capsys):
    command = build(setup, tmp_path)
    monkeypatch.setattr(command, "build_cpu", lambda: None)
    monkeypatch.setenv("RLHF_KERNELS_BUILD_CUDA", "1")
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    command.run()
    said = capsys.readouterr().err
    assert said.startswith("rlhf-kernels: the CUDA kernels were not built: ")
    assert "/nowhere/nvcc" in said
    assert "on GPUs ops run on Triton" in said
    assert "RLHF_KERNELS_BUILD_CUDA=0 does not try" in said


def test_a_tool_that_fails_is_quoted(setup, monkeypatch, tmp_path, capsys):
    command = build(setup, tmp_path)
    with (tmp_path / "log").open("w") as log, pytest.raises(subprocess.CalledProcessError) as error:
        command.stream([sys.executable, "-c", "print('[1/2] Building'); print('x.cu: error: no'); exit(3)"], log)
    assert error.value.stderr == "x.cu: error: no"
    assert capsys.readouterr().out == "rlhf-kernels: [1/2] Building\n"
    assert (tmp_path / "log").read_text() == "[1/2] Building\nx.cu: error: no\n"
    quoted = "CMake Error at x:1:\n  [1/2] nvcc\n\n  nvcc fatal   : Unsupported gpu architecture 'compute_70'\n\n"
    assert setup.first_error(quoted) == "nvcc fatal : Unsupported gpu architecture 'compute_70'"


def test_compilers_at_a_time_are_bounded(setup, monkeypatch):
    assert setup.jobs() >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.jobs() == 3
