"""OpenRLHF's functions and ours in their place agree on ragged batches, in values and gradients."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch
from ragged import B, T, V, both, hold, masks, no_further_from_the_truth

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from without_gpu import stubbed

pytest.importorskip("openrlhf")
pytest.importorskip("peft")
with stubbed():
    loss = pytest.importorskip("openrlhf.models.loss", exc_type=ImportError)
    utils = pytest.importorskip("openrlhf.models.utils")
    with contextlib.suppress(ImportError):
        importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")

from rlhf_kernels.integrations.openrlhf import patch


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

    hold(*both(patch, run, "openrlhf.models.loss.ValueLoss.forward"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7}])
def test_policy_loss(kind, dtype, by_token, dual_clip, counts):
    mask = masks()[kind].float()
    log_probs, advantages = torch.randn(2, B, T)
    old = (log_probs + 0.5 * torch.randn(B, T)).to(dtype)
    log_probs = log_probs.to(dtype).requires_grad_()

    def run():
        result, clipped, kl, *others = loss.PolicyLoss(0.2, 0.3, dual_clip, by_token)(
            log_probs, old, advantages.to(dtype), mask, **counts
        )
        assert others == [None, None]
        return result, clipped, kl, torch.autograd.grad(result, log_probs)[0]

    hold(*both(patch, run, "openrlhf.models.loss.PolicyLoss.forward"), dtype)


@pytest.mark.parametrize("by_token", [True, False])
def test_counts_are_tensors_and_no_lower_limit_is_one_too(by_token):
    """OpenRLHF has the counts on the GPU, and nobody may wait for their values there."""
    log_probs, old, advantages, mask = (*torch.randn(3, B, T), masks()["right"].float())
    counts = {"dp_size": 2, "batch_num_tokens": torch.tensor(31.0), "global_batch_size": torch.tensor(7.0)}
    policy, value = loss.PolicyLoss(1.5, 0.2, None, by_token), loss.ValueLoss(0.2, by_token)

    def run():
        return policy(log_probs, old, advantages, mask, **counts)[0], value(log_probs, old, advantages, mask, **counts)

    theirs = run()
    with patch() as patched:
        ours = run()
        assert len(patched.calls) == 2
    hold(ours, theirs)


def test_policy_losses_that_ours_has_not_go_to_openrlhf():
    log_probs, old, advantages, mask = (*torch.randn(3, B, T), torch.ones(B, T))
    with patch() as patched:
        loss.PolicyLoss(policy_loss_type="gspo")(log_probs, old, advantages, mask)
        loss.PolicyLoss(is_correction_level="token")(log_probs, old, advantages, mask, rollout_log_probs=old)
        loss.PolicyLoss(clip_eps_high=1.5)(log_probs, old, advantages, mask)
        assert patched.calls == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_pairs(dtype):
    a, b, c, d = (3 * torch.randn(4, 7)).to(dtype).requires_grad_().unbind()

    def reward():
        result = loss.PairWiseLoss()(a, b)
        return result, *torch.autograd.grad(result, (a, b))

    def dpo():
        results = loss.DPOLoss(0.3)(a, b, c.detach(), d.detach())
        return *results, *torch.autograd.grad(results[0], (a, b))

    hold(*both(patch, reward, "openrlhf.models.loss.PairWiseLoss.forward"), dtype)

    def reward_with_margin():
        result = loss.PairWiseLoss()(a, b, torch.arange(7).to(dtype) / 4)
        return result, *torch.autograd.grad(result, (a, b))

    hold(*both(patch, reward_with_margin, "openrlhf.models.loss.PairWiseLoss.forward"), dtype)
    hold(*both(patch, dpo, "openrlhf.models.loss.DPOLoss.forward"), dtype)
    with patch() as patched:  # what ours has not
        loss.DPOLoss(0.3, label_smoothing=0.1)(a, b, c, d)
        loss.DPOLoss(0.3, ipo=True)(a, b, c, d)
        assert patched.calls == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropies(dtype):
    logits = (3 * torch.randn(B, T, V)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T))
    for name, function in (
        ("log_probs_from_logits", lambda x: utils.log_probs_from_logits(x * 1, labels, 0.7)),
        ("compute_entropy", lambda x: utils.compute_entropy(x)),
    ):
        no_further_from_the_truth(patch, function, logits, f"openrlhf.models.utils.{name}")


@pytest.mark.parametrize("kind", masks())
def test_gae(kind):
    maker = pytest.importorskip("openrlhf.trainer.ppo_utils.experience_maker", exc_type=ImportError)
    values, rewards = torch.randn(2, B, T)

    def run():
        return maker.RemoteExperienceMaker.get_advantages_and_returns(None, values, rewards, masks()[kind], 0.99, 0.95)

    path = "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker.get_advantages_and_returns"
    hold(*both(patch, run, path))
