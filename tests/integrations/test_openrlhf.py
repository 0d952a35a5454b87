"""OpenRLHF's functions and ours in their place agree on ragged batches, in values and gradients."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from unittest import mock

import pytest
import torch

pytest.importorskip("openrlhf")
pytest.importorskip("peft")


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for what OpenRLHF imports, but needs only on GPUs."""

    PACKAGES = ("deepspeed", "flash_attn", "vllm")

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.PACKAGES and name != "flash_attn.ops":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: mock.MagicMock()
        return module

    def exec_module(self, module):
        pass


sys.meta_path.append(Stubs())  # after the finders of what is installed
loss = pytest.importorskip("openrlhf.models.loss", exc_type=ImportError)
utils = pytest.importorskip("openrlhf.models.utils")

from rlhf_kernels.integrations.openrlhf import patch  # noqa: E402

B, T, V = 5, 9, 33


def masks():
    """Padding on the right and on the left, holes, an empty row, and everything."""
    right = torch.arange(T) < torch.tensor([9, 5, 1, 7, 3])[:, None]
    holes = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.6
    empty = right.clone()
    empty[2] = False
    everything = torch.ones(B, T, dtype=torch.bool)
    return {"right": right, "left": right.flip(1), "holes": holes, "empty row": empty, "all": everything}


def both(function, where):
    """What OpenRLHF gives, and what ours gives in its place."""
    theirs = function()
    with patch() as patched:
        ours = function()
        assert {r.name: r.calls for r in patched.replaced if r.calls} == {f"openrlhf.{where}": 1}
    return ours, theirs


def hold(ours, theirs, dtype=torch.float32):
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7}])
def test_value_loss(kind, dtype, by_token, clip, counts):
    mask = masks()[kind].float()
    values, returns, old = torch.randn(3, B, T).to(dtype)
    values.requires_grad_()

    def run():
        result = loss.ValueLoss(clip, by_token)(values, old, returns, mask, **counts)
        return result, torch.autograd.grad(result, values)[0]

    hold(*both(run, "models.loss.ValueLoss.forward"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_pairs(dtype):
    a, b, c, d = (3 * torch.randn(4, 7)).to(dtype).requires_grad_().unbind()

    def reward():
        result = loss.PairWiseLoss()(a, b)
        return result, *torch.autograd.grad(result, (a, b))

    def dpo():
        results = loss.DPOLoss(0.3)(a, b, c.detach(), d.detach())
        return *results, *torch.autograd.grad(results[0], (a, b))

    hold(*both(reward, "models.loss.PairWiseLoss.forward"), dtype)
    hold(*both(dpo, "models.loss.DPOLoss.forward"), dtype)
    with patch() as patched:  # what ours has not
        loss.PairWiseLoss()(a, b, torch.ones(7))
        loss.DPOLoss(0.3, label_smoothing=0.1)(a, b, c, d)
        loss.DPOLoss(0.3, ipo=True)(a, b, c, d)
        assert not any(r.calls for r in patched.replaced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropies(dtype):
    logits = (3 * torch.randn(B, T, V)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T))
    for name, function in (
        ("log_probs_from_logits", lambda x: utils.log_probs_from_logits(x * 1, labels, 0.7)),
        ("compute_entropy", lambda x: utils.compute_entropy(x)),
    ):

        def run(function=function, x=logits):
            result = function(x)
            return result, torch.autograd.grad(result.float().sin().sum(), x)[0]

        ours, theirs = both(run, f"models.utils.{name}")
        exact = run(x=logits.detach().double().requires_grad_())
        for a, b, truth in zip(ours, theirs, exact, strict=True):
            assert a.dtype == b.dtype
            assert (a - truth).norm() <= 1.1 * (b - truth).norm() + 1e-5 * truth.norm(), name


@pytest.mark.parametrize("kind", masks())
def test_gae(kind):
    maker = pytest.importorskip("openrlhf.trainer.ppo_utils.experience_maker", exc_type=ImportError)
    values, rewards = torch.randn(2, B, T)

    def run():
        return maker.RemoteExperienceMaker.get_advantages_and_returns(None, values, rewards, masks()[kind], 0.99, 0.95)

    hold(*both(run, "trainer.ppo_utils.experience_maker.RemoteExperienceMaker.get_advantages_and_returns"))
