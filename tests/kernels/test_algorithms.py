"""docs/algorithms.md: every call on it gives the loss of its paper, and the gradient."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs/algorithms.md"


@pytest.fixture(scope="module")
def page():
    """What the page's code defines."""
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(block, names)
    return names


def formulas(page):
    """The losses as sums over tokens, in float64."""
    logp = page["logprobs"].detach().double().requires_grad_()
    old, ref, mask = page["old_logprobs"].double(), page["ref_logprobs"].double(), page["mask"].double()
    rewards, G = page["rewards"].double(), page["G"]
    mean = rewards.mean(1, keepdim=True)
    A = ((rewards - mean) / (rewards.std(1, keepdim=True) + 1e-4)).reshape(-1, 1)
    centred = (rewards - mean).reshape(-1, 1)
    others = (rewards - (rewards.sum(1, keepdim=True) - rewards) / (G - 1)).reshape(-1, 1)
    lengths, ratio = mask.sum(1), (logp - old).exp()

    def clipped(ratio, A, low, high):
        return -torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)

    def tokens(loss):
        return (loss * mask).sum() / mask.sum()

    def completions(loss):
        return ((loss * mask).sum(1) / lengths).mean()

    ppo = clipped(ratio, A, 0.2, 0.2)
    of_sequence = (((logp - old) * mask).sum(1) / lengths).exp()[:, None]
    k3 = (ref - logp).exp() - (ref - logp) - 1
    sums, old_sums = (logp * mask).sum(1), (old * mask).sum(1)
    return logp, {
        "PPO": tokens(ppo),
        "PPO_dual_clip": tokens(torch.where(A < 0, torch.minimum(ppo, -3 * A), ppo)),
        "GRPO": completions(ppo + 0.04 * k3),
        "DAPO": tokens(clipped(ratio, A, 0.2, 0.28)),
        "Dr_GRPO": (clipped(ratio, centred, 0.2, 0.2) * mask).sum() / mask.numel(),
        "GSPO": clipped(of_sequence, A, 3e-4, 4e-4).mean(),
        "CISPO": tokens(-ratio.clamp(max=5).detach() * A * logp),
        "RLOO": -(others[:, 0] * sums).mean(),
        "RLOO_clipped": clipped((sums - old_sums).exp(), others[:, 0], 0.2, 0.2).mean(),
    }


NAMES = ("PPO", "PPO_dual_clip", "GRPO", "DAPO", "Dr_GRPO", "GSPO", "CISPO", "RLOO", "RLOO_clipped")


@pytest.mark.parametrize("name", NAMES)
def test_losses(page, name):
    logp, want = formulas(page)
    assert want.keys() == set(NAMES)
    loss = page[name][0]
    assert loss.item() == pytest.approx(want[name].item(), rel=1e-5, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, page["logprobs"], retain_graph=True)
    (expected,) = torch.autograd.grad(want[name], logp)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["reward_model", "Llama_2", "DPO"])
def test_pairs(page, name):
    chosen, rejected = (page[x].detach().double().requires_grad_() for x in ("chosen", "rejected"))
    ref_chosen, ref_rejected, margin = (page[x].double() for x in ("ref_chosen", "ref_rejected", "margin"))
    difference = {
        "reward_model": chosen - rejected,
        "Llama_2": chosen - rejected - margin,
        "DPO": 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected)),
    }[name]
    want, loss = -torch.nn.functional.logsigmoid(difference).mean(), page[name][0]
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, (page["chosen"], page["rejected"]), retain_graph=True)
    for got, expected in zip(gradients, torch.autograd.grad(want, (chosen, rejected)), strict=True):
        torch.testing.assert_close(got, expected.float())


def test_every_algorithm_of_the_page_is_tried(page):
    given = set(re.findall(r"^(\w+) = ppo_policy_loss", PAGE.read_text(), re.M))
    assert given == set(NAMES)
