"""The search for tile shapes, as far as no GPU is needed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_kernels import backends

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(backends.missing("triton") is not None, reason="no Triton in this install")


def test_the_candidates_fit_and_the_shapes_in_use_are_among_them(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tune_triton

    from rlhf_kernels.triton import configurations

    shared = {
        (8, 0): 163 << 10,
        (8, 6): 99 << 10,
        (8, 9): 99 << 10,
        (9, 0): 227 << 10,
        (10, 0): 227 << 10,
        (12, 0): 99 << 10,
    }
    assert set(shared) == set(configurations.HALF)
    for capability, shape in configurations.HALF.items():
        fitting = list(tune_triton.candidates(shared[capability]))
        assert shape in fitting
        assert len(set(fitting)) == len(fitting)
        assert all((x.rows + x.columns) * x.depth * 2 * x.stages <= shared[capability] for x in fitting)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, BENCHMARKS / "tune_triton.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
