import os
import platform
import subprocess
import sys

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import available_backends, backends, install, kl_penalty, use_backend


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_every_backend_is_there_or_says_why_not():
    assert backends.BACKENDS == ("reference", "cpu", "triton", "cuda")
    assert "reference" in available_backends()
    for name in backends.BACKENDS:
        reason = backends.missing(name)
        assert (reason is None) == (name in available_backends())
        if reason is None:
            with use_backend(name):
                assert backends._forced == name
        else:
            with pytest.raises(RuntimeError) as error, use_backend(name):
                pass
            assert f"'{name}'" in str(error.value)
            assert reason in str(error.value)
            assert "reference" in str(error.value)


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="use_backend: is 'gpu', must be one of reference, cpu, triton, cuda"),
        use_backend("gpu"),
    ):
        pass


def test_blocks_nest_and_restore_after_an_error(monkeypatch):
    monkeypatch.setattr(backends, "_forced", None)
    with pytest.raises(ZeroDivisionError), use_backend("reference"), use_backend("reference"):
        raise ZeroDivisionError
    assert backends._forced is None


def test_the_environment_variable_forces_a_backend():
    code = "import torch, rlhf_kernels as k; k.kl_penalty(torch.zeros(1), torch.zeros(1))"
    assert run("-c", code, RLHF_KERNELS_BACKEND="reference").returncode == 0
    refused = run("-c", code, RLHF_KERNELS_BACKEND="nonsense")
    assert refused.returncode != 0
    assert "ValueError: RLHF_KERNELS_BACKEND: is 'nonsense', must be" in refused.stderr


def test_the_module_runs_as_a_program():
    report = run("-m", "rlhf_kernels")
    assert report.returncode == 0, report.stderr
    for line in (rlhf_kernels.__version__, torch.__version__, *backends.BACKENDS, "native module"):
        assert line in report.stdout


@pytest.mark.skipif(not backends.has("cpu"), reason="no native kernels in this install")
def test_the_instruction_set_is_named_and_can_be_forced():
    assert f"with {backends.isa()}" in run("-m", "rlhf_kernels").stdout
    least = "neon" if platform.machine() in ("aarch64", "arm64") else "baseline"
    assert f"with {least}" in run("-m", "rlhf_kernels", RLHF_KERNELS_ISA=least).stdout
    refused = run("-m", "rlhf_kernels", RLHF_KERNELS_ISA="sse9")
    assert refused.returncode != 0
    assert "RLHF_KERNELS_ISA: is 'sse9', must be one of" in refused.stderr


@pytest.fixture
def driver(tmp_path):
    """Makes a library for the driver, which knows CUDA up to a version and aborts the process if it is initialised."""

    def make(version):
        source, folder = tmp_path / "driver.c", tmp_path / str(version)
        folder.mkdir()
        source.write_text(
            "#include <stdlib.h>\n"
            f"int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}\n"
            "int cuInit(unsigned flags) { abort(); }\n"
        )
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1"], check=True)
        return {"LD_LIBRARY_PATH": str(folder)}

    return make


@pytest.mark.skipif(not backends.emulated("cuda"), reason="the CUDA kernels are not emulated")
def test_a_driver_that_is_too_old_is_said_in_one_line_and_leaves_the_ops_to_triton(driver):
    code = (
        "import torch, rlhf_kernels; "
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('rlhf_kernels_emulated::kl_penalty', 'CPU'))"
    )
    old, new = driver(11080), driver(12000)
    assert run("-c", code, **old).stdout.strip() == "False"
    assert run("-c", code, **new).stdout.strip() == "True"
    report = run("-m", "rlhf_kernels", **old).stdout.splitlines()
    assert [line for line in report if "backend      cuda" in line] == [
        "backend      cuda: _cuda.so was built with CUDA 12.0, which needs an NVIDIA driver of 525 or newer; this one "
        "goes up to CUDA 11.8: install a newer driver; until then GPUs run the ops on Triton"
    ]
    assert "backend      cuda: available" in run("-m", "rlhf_kernels", **new).stdout


def test_an_old_driver_may_do_for_another_cuda():
    assert install.old_driver("_cuda.so", 13000, 12080) == (
        "_cuda.so was built with CUDA 13.0, which needs an NVIDIA driver of 580 or newer; this one goes up to CUDA "
        "12.8: install a newer driver, or build with CUDA 12; until then GPUs run the ops on Triton"
    )
    assert "needs an NVIDIA driver for CUDA 15;" in install.old_driver("_cuda.so", 15010, 13000)


@pytest.mark.skipif(not backends.has("cpu"), reason="no native kernels in this install")
def test_float64_goes_to_the_reference_which_alone_has_it(monkeypatch):
    x = torch.zeros(2, dtype=torch.float64)
    monkeypatch.setattr(backends, "_forced", None)
    assert kl_penalty(x, x).dtype == torch.float64
    with use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' was asked for, which has no float64"):
        kl_penalty(x, x)


def test_importing_needs_torch_only():
    code = (
        "import sys, rlhf_kernels; "
        "print(*{m.split('.')[0] for m in sys.modules} & {'transformers', 'datasets', 'accelerate', 'rlhf', 'yaml'})"
    )
    assert run("-c", code).stdout.strip() == ""


def test_the_public_names_are_documented():
    for name in rlhf_kernels.__all__:
        assert name == "__version__" or getattr(rlhf_kernels, name).__doc__
    assert kl_penalty(torch.ones(1), torch.zeros(1)) == 1
