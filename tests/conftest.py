"""Shared by all tests: a reproducible Hypothesis profile, and the backends this install has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

import rlhf_kernels

# Derandomised, so that a run is green or red for its code alone. No deadline: nothing here depends on a clock.
settings.register_profile(
    "rlhf",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("rlhf")


@pytest.fixture(params=rlhf_kernels.available_backends())
def backend(request):
    """Runs a test once on every backend that this install has."""
    with rlhf_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
