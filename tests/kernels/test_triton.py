"""The Triton kernels without a GPU, beside the tests of all backends, where the interpreter runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import NAMES, Recorder, calls

import rlhf_kernels
from rlhf_kernels import backends

REPORT = Path(__file__).parents[2] / "benchmarks" / "triton_report.py"
pytestmark = pytest.mark.skipif(backends.missing("triton") is not None, reason="no Triton in this install")


@pytest.mark.parametrize("architecture", ["80", "90", "100", "120"])
def test_every_kernel_compiles_and_spills_nothing(architecture):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # as every version before 3.10 has it
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


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("linear")])
def test_without_waiting_for_the_number_of_rows_the_results_are_the_same(name, monkeypatch):
    """As while a CUDA graph is captured: rows that don't count stay, whatever is in them, and change nothing."""
    from rlhf_kernels.triton import linear_log_prob

    call = calls()[name]
    with rlhf_kernels.use_backend("triton"):
        want = call.run()
        monkeypatch.setattr(linear_log_prob, "may_wait", lambda tensor: False)
        mask = call.tensors.get("row_mask", call.tensors.get("mask"))
        wanted = call.tensors["labels"] != -100 if mask is None else mask
        rubbish = torch.where(wanted[..., None], call.tensors["hidden"], torch.nan)
        got = call.run(hidden=rubbish)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_captures_every_op(name):
    with rlhf_kernels.use_backend("triton"), torch.device("cuda"):
        call = calls()[name]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call.run()
        for tensor in call.tensors.values():
            if tensor.is_floating_point():
                tensor.mul_(0.5)
        graph.replay()
        for x, y in zip(got, call.run(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_on_a_gpu(name):
    """The ops as compiled code calls them, with the arguments that the public function gives them."""
    with rlhf_kernels.use_backend("cpu"), Recorder() as recorder:
        calls()[name].run()
    for function, arguments in recorder.seen:
        on_gpu = tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments)
        torch.library.opcheck(function, on_gpu, test_utils=("test_schema", "test_faketensor"))
