"""Shared by all tests: a reproducible Hypothesis profile, and the backends this install has."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU, the Triton kernels run in an interpreter and the CUDA kernels in an emulation. The variables for this
# must be set before anything imports triton or rlhf_kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parent / "native"))
    from native_build import build

    folder = build()
    if folder:
        os.environ["RLHF_KERNELS_EMULATED_CUDA"] = str(folder / "_cuda.so")

import rlhf_kernels
from rlhf_kernels.ops import OPS

# Derandomised, so that a run is green or red for its code alone. No deadline: nothing here depends on a clock. With
# --hypothesis-profile=thorough every run tries other examples, and many more of them.
ANY_TIME = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.register_profile("rlhf", ANY_TIME, derandomize=True, max_examples=20)
settings.register_profile("thorough", ANY_TIME, max_examples=200)
settings.load_profile("rlhf")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the cases that ``long_for`` names as long."""
    if torch.cuda.is_available():
        return
    for item in items:
        for mark in item.iter_markers("long_for"):
            if all(item.callspec.params[name] in values for name, values in mark.kwargs.items()):
                item.add_marker("long")


def _ops(request):
    """The ops that a test runs: those of its file's family, of its parameter ``name`` and of its mark."""
    family = request.path.stem.removeprefix("test_")
    yield from (op for op, facts in OPS.items() if facts.family == family)
    name = request.node.callspec.params.get("name", "").removesuffix("_and_entropy")
    yield from {name} & OPS.keys()
    mark = request.node.get_closest_marker("runs")
    yield from mark.args if mark else ()


def _on(request):
    name = request.param
    if name == "cuda":
        for op in _ops(request):
            if name not in OPS[op].on_gpu:
                pytest.skip(f"{op} has no CUDA C++ kernels")
    gpu = name in ("triton", "cuda") and torch.cuda.is_available()
    with rlhf_kernels.use_backend(name), torch.device("cuda" if gpu else "cpu"):
        yield name


@pytest.fixture(params=rlhf_kernels.available_backends())
def backend(request):
    """Runs a test on every backend of this install; on the GPU, if there is one and the backend is for GPUs."""
    yield from _on(request)


@pytest.fixture(params=[name for name in rlhf_kernels.available_backends() if name != "reference"])
def kernels(request):
    """The same without the reference, for tests of what it does not promise."""
    yield from _on(request)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
