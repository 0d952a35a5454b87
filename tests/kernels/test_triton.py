"""Further tests of the Triton kernels without a GPU. The tests of all backends run them in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import NAMES, calls, lacks

import rlhf_kernels
from rlhf_kernels import backends

REPORT = Path(__file__).parents[2] / "benchmarks" / "triton_report.py"
pytestmark = pytest.mark.skipif(not backends.has("triton"), reason="no Triton in this install")


@pytest.mark.long_for(architecture=["80", "100", "120"])
@pytest.mark.parametrize("architecture", ["80", "90", "100", "120"])
def test_every_kernel_compiles_and_spills_nothing(architecture):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default of every version before 3.10
    done = subprocess.run(
        [sys.executable, str(REPORT), "--arch", architecture],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no kernel spills registers" in done.stdout
    kernels = Path(rlhf_kernels.__file__).parent / "triton"
    for file in kernels.glob("*.py"):
        if "@triton.jit" in file.read_text() and file.stem != "common":
            assert f"{file.stem}." in done.stdout


def test_without_interpreter_or_gpu_a_cpu_tensor_is_refused():
    code = "import torch, rlhf_kernels as k\nwith k.use_backend('triton'): k.kl_penalty(torch.zeros(1), torch.zeros(1))"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1" in done.stderr or "these tensors are on cpu" in done.stderr


@pytest.mark.parametrize("name", [name for name in NAMES if lacks("cuda", name)])
def test_without_waiting_for_the_number_of_rows_the_results_are_the_same(name, monkeypatch):
    """As while a CUDA graph is captured: rows that don't count are kept, and change nothing, whatever is in them."""
    from rlhf_kernels.triton import linear_log_prob

    with rlhf_kernels.use_backend("triton"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        call = calls()[name]
        want = call.run()
        monkeypatch.setattr(linear_log_prob, "may_wait", lambda tensor: False)
        mask = call.tensors.get("mask")
        wanted = call.tensors["labels"] != -100 if mask is None else mask
        rubbish = torch.where(wanted[..., None], call.tensors["hidden"], torch.nan)
        got = call.run(hidden=rubbish)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
