"""Liger's kernels go into a model by Liger's own function, without its losses; or a line says why they can't."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from tools import only_line

from rlhf import training
from rlhf.liger import use_liger
from rlhf.loading import ModelError
from rlhf.models import Backbone, LanguageModel
from rlhf.settings import ConfigError


@pytest.fixture
def model(base, monkeypatch):
    """On a device that passes for a GPU."""
    loaded = LanguageModel.load(base).eval()
    tensors = torch.tensor
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    monkeypatch.setattr(torch, "tensor", lambda data, **_: tensors(data))
    return loaded


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for Liger that notes its calls, and changes weights by a factor."""
    calls, factor = [], [1.0]

    def apply(model, **options):
        calls.append(options)
        with torch.no_grad():
            next(model.parameters()).mul_(factor[0])

    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"gpt2": None}
    patch._apply_liger_kernel_to_instance = apply
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    patch.calls, patch.factor = calls, factor
    return patch


def test_without_its_losses(model, liger):
    use_liger(model)
    assert liger.calls == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_other_hidden_states_are_refused(model, liger):
    liger.factor[0] = 1.1
    with pytest.raises(ModelError, match="gpt2: with Liger's kernels, its hidden states are off by 0"):
        use_liger(model)


def test_other_types(model, liger):
    del liger.MODEL_TYPE_TO_APPLY_LIGER_FN["gpt2"]
    with pytest.raises(ConfigError, match="liger: is true, but this release of Liger has nothing for gpt2 models"):
        use_liger(model)


def test_not_installed(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        use_liger(model)


def test_every_model_of_a_run(ppo_config, monkeypatch):
    from rlhf import ppo

    given = []
    monkeypatch.setattr(training, "use_liger", given.append)
    ppo.train(ppo_config(liger=True, episodes=16))
    assert len({id(model) for model in given}) == 4


def test_on_a_cpu(rlhf, base, data, tmp_path):
    settings = ["--model", base, "--data", data.demonstrations, "--device", "cpu", "--liger", "true"]
    status, error = rlhf("sft", *settings, "--output_dir", tmp_path / "run")
    assert status == 2
    assert "liger: is true, but Liger's kernels need a GPU" in only_line(error)
    assert not (tmp_path / "run").exists()
