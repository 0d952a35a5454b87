"""Further tests of the Triton kernels without a GPU. The tests of all backends run them in the interpreter."""

import contextlib
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


def test_workspaces_of_the_linear_family():
    """What is held beside the gradients at N = 8 192, D = 4 096, V = 128 256; and chunks that leave no small rest."""
    from rlhf_kernels.triton import linear_log_prob as family

    count, depth, vocabulary = 8192, 4096, 128_256
    assert family.rows_at_a_time(count, vocabulary) == 1024
    assert 1024 * vocabulary * 4 <= 512 << 20
    assert family.ROWS * vocabulary * 4 <= 256 << 20
    tokens = family.tokens_at_a_time(count, depth)
    assert 0 < count * tokens * (4 + 2) + count * depth * 4 <= 256 << 20
    for some in (1, 128, 1000, 1025, 1100, 5000):
        each = family.rows_at_a_time(some, vocabulary)
        assert each % family.TILE == 0
        chunks = -(-some // each)
        assert chunks == -(-some // 1024)
        assert some - (chunks - 1) * each > each - chunks * family.TILE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_losses_in_one_chunk_or_many(dtype, monkeypatch):
    """The buffer of logits, over which their gradients are written, is used again."""
    from rlhf_kernels.triton import linear_log_prob as family

    torch.manual_seed(0)
    hidden, weight = torch.randn(75, 16).to(dtype), torch.randn(90, 16).to(dtype)
    index, old, advantages = torch.randint(0, 90, (75,)), -torch.rand(1, 75), torch.randn(1, 75)

    def run():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = [
            rlhf_kernels.linear_cross_entropy(h, w, index, softcap=5.0),
            rlhf_kernels.linear_ppo_policy_loss(h[None], w, index[None], old, advantages, None)[0],
        ]
        return [*losses, *torch.autograd.grad(losses[0] + 2 * losses[1], (h, w))]

    with rlhf_kernels.use_backend("triton"):
        whole = run()
        monkeypatch.setattr(family, "TILE", 32)
        monkeypatch.setattr(family, "LOSS_BYTES", 32 * 90 * 4)
        assert family.rows_at_a_time(75, 90) == 32
        parts = run()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, many in zip(whole, parts, strict=True):
        torch.testing.assert_close(many, one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_device_of_its_tensors(name, monkeypatch):
    """Whichever is the current one: kernels are launched while torch has been told of the tensors' device."""
    from triton.runtime.interpreter import InterpretedFunction

    devices, launched_on = [], set()

    @contextlib.contextmanager
    def device_of(tensor):
        devices.append(tensor.device)
        yield
        devices.pop()

    launch = InterpretedFunction.__getitem__
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(
        InterpretedFunction, "__getitem__", lambda self, grid: launched_on.add(tuple(devices)) or launch(self, grid)
    )
    with rlhf_kernels.use_backend("triton"):
        sum(x.sum() for x in calls()[name].run() if x.requires_grad)
    assert launched_on == {(torch.device("cpu"),)}


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


def test_eight_parts_of_a_loss_make_the_error_of_its_weight_gradient_a_third_larger(monkeypatch):
    """Parts are added to a sum in bfloat16. One in float32 would take twice the gradient's memory, gigabytes.

    Most of the error comes from the logits' gradient, which the matmul takes in bfloat16.
    """
    from rlhf_kernels.triton import linear_log_prob

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(256, 64, device=device).bfloat16()
    weight = torch.randn(96, 64, device=device).div(4).bfloat16().requires_grad_()
    labels = torch.randint(0, 96, (256,), device=device)
    exact = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.double() @ exact.T, labels).backward()

    def error(rows):
        monkeypatch.setattr(linear_log_prob, "rows_at_a_time", lambda count, vocabulary: rows)
        with rlhf_kernels.use_backend("triton"):
            (got,) = torch.autograd.grad(rlhf_kernels.linear_cross_entropy(hidden, weight, labels), weight)
        return float((got.double() - exact.grad).norm() / exact.grad.norm())

    assert error(256) < error(32) < 1.5 * error(256)
