"""What an op for GPUs asks of the host: how often it launches and allocates, and that it waits for nothing.

The ops of the linear family are mostly matmuls: of those it is tested how often they launch kernels of ours, and when
they wait.

Each call is made through the public function, as on a GPU: without the looks at values that only CPU tensors get. The
kernels are the CUDA ones under the emulation, which counts its launches, and Triton's, which are counted and not run.
"""

import contextlib
import ctypes
import os

import pytest
import torch
from calls import NAMES, calls, lacks, packed_calls
from torch.autograd.profiler import profile

import rlhf_kernels
from rlhf_kernels import backends, checks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels that are counted run on CPU tensors")

# Operators of torch that only make another view of a tensor.
VIEWS = {
    "detach", "view", "view_as", "alias", "as_strided", "reshape", "_reshape_alias", "flatten", "expand", "select",
    "slice", "unbind", "unsqueeze", "squeeze", "t", "transpose", "lift_fresh", "result_type", "set_", "resolve_conj",
    "resolve_neg", "contiguous", "to",
}  # fmt: skip
ALLOCATIONS = {"empty", "empty_strided", "empty_like"}
# On a GPU each of these waits until it has done all that it was given.
WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
# How often an op launches, where that is not once: a second time where it needs a sum over the batch first.
BATCH = ("masked_gae", "ppo_advantages", "ppo_policy_loss", "ppo_value_loss", "pairwise_ranking_loss")
ROWS = ("selective_log_softmax", "selective_log_softmax_and_entropy", "sample_tokens")
LAUNCHES = {"cuda": dict.fromkeys(BATCH, 2), "triton": dict.fromkeys((*BATCH, *ROWS), 2)}
# What the derivative of an op adds to its own launch, of torch's operators: a loss's saved gradient times the one that
# comes in, and the second argument's gradient from the first one's.
DERIVATIVE = {
    "ppo_policy_loss": ["mul"],
    "ppo_value_loss": ["mul"],
    "pairwise_ranking_loss": ["mul"],
    "kl_penalty": ["neg"],
}
SMALL = [name for name in NAMES if not lacks("cuda", name)]
LINEAR = [name for name in NAMES if lacks("cuda", name)]


class Counted:
    """What was launched, allocated and done by torch inside :func:`counting`."""

    launches = 0
    allocations = 0
    others: list[str]
    waits: list[str]


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch):
    if not backends.has(request.param):
        pytest.skip(backends.missing(request.param))
    for name in ("_check_mask", "_check_boundaries", "_check_drawn"):
        monkeypatch.setattr(checks, name, lambda value, *_: value)
    monkeypatch.setattr(checks, "read_index", lambda backend, name, value, *_: value)
    with rlhf_kernels.use_backend(request.param):
        yield request.param


@contextlib.contextmanager
def counting(backend, monkeypatch):
    counted, grids = Counted(), []
    counted.waits = []

    def noting(name, function):
        def noted(*arguments, **options):
            counted.waits.append(name)
            return function(*arguments, **options)

        return noted

    with monkeypatch.context() as patch, profile(use_cpu=True) as record:
        patch.setattr(torch.cuda, "synchronize", lambda *_: counted.waits.append("synchronize"))
        for name in WAITS:
            patch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
        if backend == "triton":
            from triton.runtime.interpreter import InterpretedFunction

            patch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *_, **__: grids.append(grid))
        before = cuda_launches() if backend == "cuda" else 0
        yield counted
        counted.launches = len(grids) if backend == "triton" else cuda_launches() - before
    names = [event.name.removeprefix("aten::") for event in record.function_events if event.name.startswith("aten::")]
    counted.allocations = sum(name in ALLOCATIONS for name in names)
    of_waits = {"item", "_local_scalar_dense", "is_nonzero"}
    counted.others = [name for name in names if name not in VIEWS | ALLOCATIONS | of_waits]


def cuda_launches():
    library = ctypes.CDLL(os.environ["RLHF_KERNELS_EMULATED_CUDA"])
    library.rlhf_kernels_launches.restype = ctypes.c_int64
    return library.rlhf_kernels_launches()


def typical(call):
    """A call with what trainers have: a float mask, int32 indices, and rows that are a slice of longer ones."""
    tensors = dict(call.tensors)
    if "mask" in tensors:
        tensors["mask"] = tensors["mask"].float()
    for name in ("index", "stream", "step"):
        if name in tensors:
            longer = torch.zeros(len(tensors[name]), tensors[name].shape[1] + 1, dtype=torch.int32)
            longer[:, 1:] = tensors[name]
            tensors[name] = longer[:, 1:]
    return call._replace(tensors=tensors)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_forward(backend, monkeypatch, name, masked):
    call = typical(calls()[name])
    if not masked:
        call = call._replace(tensors=call.tensors | ({"mask": None} if "mask" in call.tensors else {}))
    if backend == "triton":  # which copies what is not dense; a mask of any dtype it reads as it is
        call = call._replace(tensors={n: x if x is None else x.contiguous() for n, x in call.tensors.items()})
    with counting(backend, monkeypatch) as counted, torch.no_grad():
        call.function(**call.tensors, **call.options)
    schema = getattr(torch.ops.rlhf_kernels, name.removesuffix("_and_entropy")).default._schema
    assert counted.launches == LAUNCHES[backend].get(name, 1)
    assert counted.others == counted.waits == []
    assert counted.allocations <= len(schema.returns) + 1


def test_a_step_that_all_rows_share_costs_no_launch(backend, monkeypatch):
    logits, stream = torch.randn(5, 301), torch.arange(5)
    with counting(backend, monkeypatch) as counted:
        rlhf_kernels.sample_tokens(logits, seed=3, stream=stream, step=7)
    assert counted.launches == LAUNCHES[backend].get("sample_tokens", 1)
    # A scalar on the CPU, which Triton takes as a number.
    assert counted.others == ["scalar_tensor"]
    assert counted.waits == (["item"] if backend == "triton" else [])


@pytest.mark.parametrize("name", sorted(packed_calls()))
def test_packed(backend, monkeypatch, name):
    call = packed_calls()[name]
    with counting(backend, monkeypatch) as counted, torch.no_grad():
        call.function(**call.tensors, **call.options)
    assert counted.launches <= 2
    assert counted.others == counted.waits == []


@pytest.mark.parametrize("name", [name for name in SMALL if calls()[name].variables])
def test_backward(backend, monkeypatch, name):
    call = calls()[name]
    tensors = {n: x.detach().requires_grad_(n in call.variables) for n, x in call.tensors.items()}
    result = call.function(**tensors, **call.options)
    result = result[0] if isinstance(result, tuple) else result
    gradient = torch.ones_like(result) if result.dim() else torch.full((), 2.0)
    with counting(backend, monkeypatch) as counted:
        torch.autograd.grad(result, [tensors[n] for n in call.variables], gradient)
    of_torch = DERIVATIVE.get(name, [])
    assert counted.launches == (0 if of_torch == ["mul"] else 1)
    assert counted.others == of_torch
    assert counted.waits == (["item"] if of_torch == ["mul"] else [])  # a loss looks whether a gradient on a CPU is 1


@pytest.mark.parametrize("name", LINEAR)
def test_the_linear_ops_wait_once_for_the_number_of_rows(backend, monkeypatch, name):
    if backend == "cuda":
        pytest.skip("the linear family is in Triton")
    call = typical(calls()[name])
    with counting(backend, monkeypatch) as counted, torch.no_grad():
        call.function(**call.tensors, **call.options)
    assert counted.others.count("nonzero") == 1
    assert counted.waits == []
    assert counted.launches == (2 if "log_softmax" in name else 1)


def test_without_a_mask_a_linear_loss_does_not_wait(backend, monkeypatch):
    if backend == "cuda":
        pytest.skip("the linear family is in Triton")
    call = calls()["linear_ppo_policy_loss"]
    with counting(backend, monkeypatch) as counted, torch.no_grad():
        call.function(**call.tensors | {"mask": None}, **call.options)
    assert "nonzero" not in counted.others
    assert counted.waits == []
