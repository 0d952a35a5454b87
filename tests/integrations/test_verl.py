"""verl's functions and ours in their place agree on ragged batches, in values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from ragged import B, T, V, both, hold, masks, no_further_from_the_truth

core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
functional = pytest.importorskip("verl.utils.torch_functional")
fused = pytest.importorskip("verl.utils.experimental.torch_functional")

from rlhf_kernels.integrations.verl import patch  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("kind", masks())
def test_gae(kind, dtype):
    mask = masks()[kind].to(dtype if dtype != torch.bool else torch.int64)
    rewards, values = torch.randn(2, B, T)

    def run():
        return core.compute_gae_advantage_return(rewards, values, mask, torch.tensor(0.99), 0.95)

    ours, theirs = both(patch, run, "verl.trainer.ppo.core_algos.compute_gae_advantage_return")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a * mask, b * mask, rtol=1e-4, atol=1e-5)
    found = core.get_adv_estimator_fn("gae")
    with patch():
        assert core.get_adv_estimator_fn("gae") is not found
    assert core.get_adv_estimator_fn("gae") is found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7}])
def test_value_loss(kind, dtype, mode, counts):
    mask = masks()[kind].long()
    values, returns, old = torch.randn(3, B, T).to(dtype)
    values.requires_grad_()

    def run():
        loss, clipped = core.compute_value_loss(values, returns, old, mask, 0.2, loss_agg_mode=mode, **counts)
        return loss, clipped, torch.autograd.grad(loss, values)[0]

    hold(*both(patch, run, "verl.trainer.ppo.core_algos.compute_value_loss"), dtype)


def actor_config(**options):
    config = pytest.importorskip("verl.workers.config", exc_type=ImportError)
    return config.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("loss_mode", ["vanilla", "gspo", "cispo"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_policy_losses(kind, dtype, loss_mode, mode):
    mask = masks()[kind]
    log_probs, advantages = torch.randn(2, B, T)
    old = (log_probs + 0.5 * torch.randn(B, T)).to(dtype)
    log_probs, advantages = log_probs.to(dtype).requires_grad_(), advantages.to(dtype)
    for counts in ({}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7}):
        config = actor_config(clip_ratio_high=0.3, clip_ratio_c=1.5)
        config.global_batch_info.update(counts)

        def run(config=config):
            loss_of = core.get_policy_loss_fn(loss_mode)
            loss, statistics = loss_of(old, log_probs, advantages, mask, loss_agg_mode=mode, config=config)
            assert all(type(x) is float for x in statistics.values())
            return loss, torch.autograd.grad(loss, log_probs)[0], *map(torch.tensor, statistics.values())

        hold(*both(patch, run, f"verl.trainer.ppo.core_algos.compute_policy_loss_{loss_mode}"), dtype)


@pytest.mark.parametrize("loss_mode", ["vanilla", "cispo"])
def test_statistics_and_limits_at_their_ends(loss_mode):
    """Log-ratios beyond verl's clamp, and a lower limit that is none."""
    log_probs, advantages = torch.randn(2, B, T)
    old = log_probs + 30 * torch.randn(B, T)
    config = actor_config(clip_ratio_low=1.5)
    config.global_batch_info.update({"batch_num_tokens": torch.tensor(31), "dp_size": 1})

    def run():
        loss, statistics = core.get_policy_loss_fn(loss_mode)(
            old, log_probs, advantages, masks()["holes"], config=config
        )
        return loss, *map(torch.tensor, statistics.values())

    hold(*both(patch, run, f"verl.trainer.ppo.core_algos.compute_policy_loss_{loss_mode}"))


def test_policy_losses_that_ours_has_not_go_to_verl():
    log_probs, old, advantages, mask = torch.randn(B, T), torch.randn(B, T), torch.randn(B, T), torch.ones(B, T).bool()
    far = log_probs - 12
    with patch() as patched:
        vanilla, gspo = (core.get_policy_loss_fn(name) for name in ("vanilla", "gspo"))
        loss, _ = gspo(far, log_probs, -advantages.abs(), mask, config=actor_config())  # verl limits e^12 to e^10
        assert loss.item() == pytest.approx(advantages.abs().mean().item() * math.exp(10), rel=1e-3)
        vanilla(old, log_probs, advantages, mask, config=actor_config(), rollout_is_weights=torch.ones(B, T))
        vanilla(old, log_probs, advantages, mask, loss_agg_mode="seq-mean-token-sum-norm", config=actor_config())
        vanilla(old, log_probs, advantages, mask, config=actor_config(clip_ratio_high=4.0))
        assert patched.calls == {}


def test_modes_that_ours_has_not_go_to_verl():
    values, returns, old = torch.randn(3, B, T)
    with patch() as patched:
        core.compute_value_loss(values, returns, old, torch.ones(B, T), 0.2, loss_agg_mode="seq-mean-token-sum-norm")
        assert patched.calls == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropies(dtype):
    logits = (3 * torch.randn(B * T, V)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B * T,))
    for name, function in (
        ("logprobs_from_logits", lambda x: functional.logprobs_from_logits(x, labels)),
        ("entropy_from_logits", lambda x: functional.entropy_from_logits(x)),
        ("entropy_from_logits_with_chunking", lambda x: functional.entropy_from_logits_with_chunking(x)),
    ):
        no_further_from_the_truth(patch, function, logits, f"verl.utils.torch_functional.{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(B * T,), (B, T)])
def test_log_probs_from_hidden_states(shape, dtype):
    hidden = torch.randn(*shape, 16).to(dtype).requires_grad_()
    weight = torch.randn(V, 16).to(dtype).requires_grad_()
    labels = torch.randint(0, V, shape)

    def run():
        logprobs, entropy = fused.FusedLinearForPPO()(hidden, weight, labels, temperature=0.8)
        gradients = torch.autograd.grad(logprobs.sin().sum() + entropy.float().sum(), (hidden, weight))
        return logprobs, entropy, *gradients

    path = "verl.utils.experimental.torch_functional.FusedLinearForPPO.forward"
    for a, b in zip(*both(patch, run, path), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * b.norm()
