"""PPO: its ratio, penalty and gradient in the extreme cases in which the right answer is known."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tools import metrics, write_jsonl

from rlhf import ppo
from rlhf.average import MovingAverage
from rlhf.checkpoints import RunError
from rlhf.config import Adam, LengthConfig, warmup_from_tenth
from rlhf.data import Limits, PromptExample, read_prompts, read_texts, tokenize_prompts
from rlhf.loading import load_tokenizer
from rlhf.models import LanguageModel, ScalarModel
from rlhf.rewards import make_rewards
from rlhf.rollout import Completion, sample
from rlhf.sft import mean_loss, pretraining_examples


def weights(path):
    return load_file(Path(path) / "model.safetensors")


def distance(first, second):
    """The largest difference between two models' weights."""
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.fixture
def constant_reward(reward_model, tmp_path):
    """A reward model that scores everything alike."""
    model = ScalarModel.load(reward_model)
    torch.nn.init.zeros_(model.head.weight)
    model.save(tmp_path / "constant", load_tokenizer(reward_model))
    return str(tmp_path / "constant")


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"tokens_per_forward": 40, "inner_epochs": 2}], ids=str)
def test_ratio_is_one_at_the_first_minibatch(ppo_config, settings):
    config = ppo_config(gamma_ptx=1.0, **settings)
    ppo.train(config)
    records = metrics(Path(config.output_dir))
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert max(record["ratio_max_deviation"] for record in records) < 1e-4
    assert min(record["kl"] for record in records[1:]) != 0  # the policy has moved, so a ratio of 1 means something


def test_ratio_is_not_one_later(ppo_config, open_run, base, reward_model):
    """The ratio after an update, to see that the figure measures anything."""
    run, actors, episodes = collected(ppo_config(), open_run, base, reward_model)
    before = ppo.policy_step(run, actors.policy, episodes)["ratio_max_deviation"]
    with torch.no_grad():
        for parameter in actors.policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    assert before < 1e-4
    assert ppo.policy_step(run, actors.policy, episodes)["ratio_max_deviation"] > 1e-2


def test_wrong_logprobs_are_warned_of(ppo_config, monkeypatch, caplog):
    def off(*arguments, **options):
        return [Completion(c.tokens, c.logprobs + 0.01) for c in sample(*arguments, **options)]

    monkeypatch.setattr(ppo, "sample", off)
    with caplog.at_level(logging.WARNING, "rlhf"):
        ppo.train(ppo_config(episodes=32))
    warnings = [record.message for record in caplog.records if record.name == "rlhf.ppo"]
    assert len(warnings) == 2
    assert warnings[0].startswith("iteration 0: the ratio π/π_old is off 1 by 0.00995 before any update")


def test_right_logprobs_are_not_warned_of(ppo_config, caplog):
    with caplog.at_level(logging.WARNING, "rlhf"):
        ppo.train(ppo_config(episodes=32))
    assert [record for record in caplog.records if record.name == "rlhf.ppo"] == []


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-3), ("fp16", 0.05), ("bf16", 0.2)])
def test_rounding_is_not_warned_of(precision, tolerance, caplog):
    ppo.check_ratio(3, tolerance, precision)
    assert caplog.messages == []
    ppo.check_ratio(3, 1.25 * tolerance, precision)
    assert caplog.messages == [
        f"iteration 3: the ratio π/π_old is off 1 by {1.25 * tolerance:.3g} before any update (float rounding gives "
        f"less than {tolerance:g}). The log-probs of the rollout are not those of the model in training, so PPO's "
        "clipping is off as well"
    ]


def divergence(first, second, data, base):
    """KL(first ‖ second) of the token after a prompt, exact, in nats; the mean over all prompts."""
    limits, tokenizer = Limits(16, 8, 64), load_tokenizer(base)
    first, second = (LanguageModel.load(str(path)).eval().model for path in (first, second))
    total, examples = 0.0, tokenize_prompts(read_prompts([data.prompts]), tokenizer, limits)
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.prompt_ids])
            p, q = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (first, second))
            total += (p.exp() * (p - q)).sum().item()
    return total / len(examples)


def test_constant_reward_keeps_the_policy_at_the_sft_model(ppo_config, constant_reward, base, data):
    """Only the penalty is left, and it is 0 at the SFT model: no advantage, no gradient.

    The optimizers' eps is large, so that they do not scale rounding errors up to full steps.
    """
    adam = Adam(0.1, eps=1.0)
    settings = {"kl_coefficient": 0.1, "episodes": 160, "whiten_advantages": False, "adam": adam, "value_adam": adam}
    config = ppo_config("constant", reward_model=constant_reward, **settings)
    path = ppo.train(config)
    assert max(abs(record["kl"]) for record in metrics(Path(config.output_dir))) < 1e-3
    assert distance(path, base) < 1e-4
    assert divergence(path, base, data, base) < 1e-6

    other = ppo.train(ppo_config("other", **settings))  # a reward that is not constant does move it
    assert distance(other, base) > 1e-3


def test_constant_reward_at_the_paper_s_settings(ppo_config, constant_reward, base, data):
    """Whitening scales even rounding errors to variance 1. They must not move the policy anywhere."""
    adam, value_adam = Adam(5e-6, eps=1e-5), Adam(9e-6, eps=1e-5)
    config = ppo_config(reward_model=constant_reward, episodes=320, adam=adam, value_adam=value_adam, ema_decay=0.0)
    path = ppo.train(config)
    assert len(metrics(Path(config.output_dir))) == 20
    assert divergence(path, base, data, base) < 1e-5


def test_penalty_alone_brings_the_policy_back(ppo_config, constant_reward, base, data, tmp_path, monkeypatch):
    """Under a constant reward, a policy that starts away from the reference is pulled towards it."""
    torch.manual_seed(4)
    policy = LanguageModel.load(base)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    policy.save(tmp_path / "moved", load_tokenizer(base))
    config = ppo_config(
        policy=str(tmp_path / "moved"),
        reward_model=constant_reward,
        kl_coefficient=1.0,
        episodes=32 * 25,
        batch_size=32,
        ema_decay=0.8,
    )
    with monkeypatch.context() as patch:
        change_reference(patch, lambda _: LanguageModel.load(base).eval())
        path = ppo.train(config)
    before = divergence(tmp_path / "moved", base, data, base)
    assert before > 0.05
    assert divergence(path, base, data, base) < 0.7 * before


def change_reference(monkeypatch, change):
    """Changes the reference, which is the first model that a run freezes."""
    place, count = ppo.Run.place_frozen, iter(range(3))

    def first_is_other(*arguments):
        frozen = place(*arguments)
        return change(frozen) if next(count) == 0 else frozen

    monkeypatch.setattr(ppo.Run, "place_frozen", first_is_other)


def perturbed(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_without_penalty_and_mix_the_reference_does_not_matter(ppo_config, data, tmp_path, monkeypatch):
    """β = 0 and γ_ptx = 0 is PPO on the reward alone."""
    plain = ppo.train(ppo_config("plain", kl_coefficient=0.0))
    texts = write_jsonl(tmp_path / "other.jsonl", [{"text": "w05 w04 w03 " * 30}])
    with monkeypatch.context() as patch:
        change_reference(patch, perturbed)
        other = ppo.train(ppo_config("other", kl_coefficient=0.0, pretraining_data=texts))
    assert distance(plain, other) == 0
    kl = [metrics(tmp_path / name)[0]["kl"] for name in ("plain", "other")]
    assert kl[0] != kl[1]  # it is still reported


@pytest.mark.parametrize("settings", [{"kl_coefficient": 0.5}, {"kl_coefficient": 0.0, "gamma_ptx": 1.0}], ids=str)
def test_with_penalty_or_mix_they_do_matter(ppo_config, tmp_path, monkeypatch, settings):
    """The test above relies on this."""
    plain = ppo.train(ppo_config("plain", episodes=32, **settings))
    texts = write_jsonl(tmp_path / "other.jsonl", [{"text": "w05 w04 w03 " * 30}])
    with monkeypatch.context() as patch:
        change_reference(patch, perturbed)
        other = ppo.train(ppo_config("other", episodes=32, pretraining_data=texts, **settings))
    assert distance(plain, other) > 1e-5


def collected(config, open_run, base, reward_model):
    """A run and the four models, with one batch of episodes."""
    run = open_run("ppo", config)
    tokenizer = load_tokenizer(base)
    limits = Limits(16, 8, 64)
    prompts = tokenize_prompts(read_prompts([config.prompts]), tokenizer, limits)
    policy, reference = LanguageModel.load(base).eval(), LanguageModel.load(base).eval()
    value, reward = ScalarModel.load(reward_model).eval(), ScalarModel.load(reward_model).eval()
    rewards = make_rewards(config, reward, {}, tokenizer, frozenset({tokenizer.eos_token_id}))
    actors = ppo.Actors(policy, value, reference, rewards)
    torch.manual_seed(0)
    episodes, _ = ppo.collect(run, actors, prompts[:16], range(16))
    return run, actors, episodes


def test_without_penalty_rewards_are_the_score_alone(ppo_config, open_run, base, reward_model):
    """With λ = γ = 1 and no whitening, the return of every token is the score of its completion."""
    config = ppo_config(kl_coefficient=0.0, lam=1.0, whiten_advantages=False)
    _, actors, episodes = collected(config, open_run, base, reward_model)
    for episode in episodes:
        batch = actors.rewards.model.lay_out([episode.group])
        score = actors.rewards.model(batch, batch.last)
        torch.testing.assert_close(episode.returns, score.expand(len(episode.response)).detach())
        torch.testing.assert_close(episode.advantages, (score - episode.values).detach())
        torch.testing.assert_close(episode.values, actors.value(batch, batch.before).detach())


def test_penalty_is_beta_times_the_log_ratio(ppo_config, open_run, base, reward_model, monkeypatch):
    """The return of a completion's first token: its score less β times the sum of its log-ratios."""
    run, actors, _ = collected(ppo_config(), open_run, base, reward_model)
    with torch.no_grad():
        for parameter in actors.reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    run.config = replace(run.config, kl_coefficient=0.3, lam=1.0, whiten_advantages=False)
    prompts = [PromptExample([5, 6, 7], ""), PromptExample([9], "")]
    episodes, figures = ppo.collect(run, actors, prompts, range(len(prompts)))
    kl = 0.0
    for episode in episodes:
        batch = actors.rewards.model.lay_out([episode.group])
        tokens = batch.targets
        logits = actors.reference.model(batch.input_ids).logits[0].log_softmax(-1)
        log_ratio = episode.logprobs - logits[batch.before, tokens]
        expected = actors.rewards.model(batch, batch.last)[0] - 0.3 * log_ratio.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(episode.returns, expected.detach(), atol=1e-4, rtol=1e-4)
        kl += log_ratio.sum().item() / len(prompts)
    assert figures["kl"] == pytest.approx(kl, abs=1e-4)


def test_advantages_are_worked_out_on_the_run_s_device(ppo_config, open_run, base, reward_model, monkeypatch):
    """Log-probs come from the CPU, and rewards from the device on which a function made them."""
    run, actors, _ = collected(ppo_config(missing_eos_penalty=1.0), open_run, base, reward_model)
    devices = []

    class SeenError(Exception):
        pass

    def advantages(score, logprobs, ref_logprobs, values, mask, *, cu_seqlens, **_):
        devices.extend(tensor.device.type for tensor in (score, logprobs, ref_logprobs, values, cu_seqlens))
        raise SeenError  # a tensor on this device has no values

    monkeypatch.setattr(ppo, "ppo_advantages", advantages)
    monkeypatch.setattr(type(run), "device", torch.device("meta"))
    with pytest.raises(SeenError):
        ppo.collect(run, actors, [PromptExample([5, 6, 7], ""), PromptExample([9], "")], [0, 1])
    assert devices == ["meta"] * 5


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("policy", "logit of the policy"),
        ("reference", "log probability of the reference"),
        ("value", "value of the value model"),
    ],
)
def test_a_model_that_has_gone_bad_is_named(part, named, ppo_config, open_run, base, reward_model):
    run, actors, _ = collected(ppo_config(), open_run, base, reward_model)
    run.step = 4
    torch.nn.init.constant_(next(getattr(actors, part).parameters()), float("nan"))
    with pytest.raises(RunError, match=f"^step 4: the {named} is nan; there is no checkpoint yet"):
        ppo.collect(run, actors, [PromptExample([5, 6, 7], "")], [0])


def test_whitened_advantages(ppo_config, open_run, base, reward_model):
    _, _, episodes = collected(ppo_config(), open_run, base, reward_model)
    advantages = torch.cat([episode.advantages for episode in episodes])
    assert abs(advantages.mean().item()) < 1e-5
    assert advantages.std().item() == pytest.approx(1, abs=0.02)


@pytest.fixture
def bandit(base, tmp_path, tokenizer):
    """A reward model that likes answers which end with one word, however they begin."""
    model = ScalarModel.load(base)
    ids = torch.arange(3, len(tokenizer))[:, None]
    with torch.no_grad():
        states = model.model.base_model(ids).last_hidden_state[:, 0]
        liked = states[10] - states.mean(0)
        model.head.weight.copy_(liked / liked.square().sum() * 4)
    model.save(tmp_path / "bandit", load_tokenizer(base))
    return str(tmp_path / "bandit")


def bandit_config(ppo_config, bandit, **options):
    """One token per answer, a high learning rate, and a value model that keeps up."""
    settings = {
        "reward_model": bandit,
        "batch_size": 64,
        "minibatch_size": 32,
        "episodes": 64 * 25,
        "adam": Adam(3e-3, eps=1e-5),
        "value_adam": Adam(3e-3, eps=1e-5),
        "lengths": LengthConfig(max_prompt_tokens=16, max_response_tokens=1),
        "ema_decay": 0.9,
    }
    return ppo_config(**settings | options)


def test_bandit_is_learnt(ppo_config, bandit):
    config = bandit_config(ppo_config, bandit)
    ppo.train(config)
    reward = [record["reward"] for record in metrics(Path(config.output_dir))]
    entropy = [record["entropy"] for record in metrics(Path(config.output_dir))]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 1.5
    assert entropy[-1] < entropy[0] / 2


def test_high_price_holds_the_bandit_back(ppo_config, bandit):
    cheap, dear = (
        bandit_config(ppo_config, bandit, name=f"beta-{beta}", kl_coefficient=beta, episodes=64 * 15)
        for beta in (0.0, 5.0)
    )
    ppo.train(cheap)
    ppo.train(dear)
    cheap, dear = metrics(Path(cheap.output_dir)), metrics(Path(dear.output_dir))
    assert dear[-1]["kl"] < 0.3 * cheap[-1]["kl"]
    assert dear[-1]["reward"] < cheap[-1]["reward"]


def test_ptx_lowers_the_pretraining_loss(ppo_config, open_run, base, data):
    run = open_run("measure", ppo_config("measure"))
    chunks = pretraining_examples(read_texts([data.texts]), load_tokenizer(base), 16)

    def loss(path):
        return mean_loss(run, LanguageModel.load(str(path)), chunks)

    before = loss(base)
    plain = loss(ppo.train(ppo_config("plain", ema_decay=0.5)))
    mixed = ppo_config("mixed", ema_decay=0.5, gamma_ptx=27.8)
    ptx = loss(ppo.train(mixed))
    assert ptx < min(plain, before) - 0.05
    recorded = [record["pretraining_loss"] for record in metrics(Path(mixed.output_dir))]
    assert recorded[-1] < recorded[0]
    assert "pretraining_loss" not in metrics(Path(mixed.output_dir).with_name("plain"))[0]


def test_accumulated_gradients_give_the_same_weights(ppo_config, tmp_path):
    settings = {"gamma_ptx": 1.0, "adam": Adam(1e-3, eps=1e-3), "value_adam": Adam(1e-3, eps=1e-3), "ema_decay": 0.0}
    whole = ppo.train(ppo_config("whole", **settings))
    parts = ppo.train(ppo_config("parts", tokens_per_forward=20, **settings))
    assert distance(whole, parts) < 1e-5
    for first, second in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-4)


def test_average_of_weights(base):
    moved = LanguageModel.load(base)
    average = MovingAverage(moved, 0.992)
    before = {name: tensor.detach().clone() for name, tensor in moved.named_parameters()}
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = {name: tensor.detach().clone() for name, tensor in moved.named_parameters()}
    average.update()
    with average.in_place():
        for name, tensor in moved.named_parameters():
            torch.testing.assert_close(tensor.detach(), 0.992 * before[name] + 0.008 * after[name])
    assert all(torch.equal(tensor, after[name]) for name, tensor in moved.named_parameters())


def test_average_is_what_is_kept(ppo_config, base):
    """With decay 0 the last policy is kept. A slow average has hardly left the SFT model."""
    last = ppo.train(ppo_config("last", ema_decay=0.0))
    slow = ppo.train(ppo_config("slow", ema_decay=0.9999))
    assert 0 < distance(slow, base) < 1e-4
    assert distance(last, base) > 1e-3


def test_learning_rate_warms_up_from_a_tenth(ppo_config):
    assert [warmup_from_tenth(i, 10) for i in (0, 5, 10, 11)] == pytest.approx([0.1, 0.55, 1, 1])
    assert warmup_from_tenth(0, 0) == 1
    config = ppo_config(warmup_iterations=2)
    ppo.train(config)
    rates = [record["learning_rate"] for record in metrics(Path(config.output_dir))]
    assert rates == pytest.approx([1e-4, 5.5e-4, 1e-3, 1e-3])


def test_keep_every(ppo_config):
    config = ppo_config(keep_every=2)
    path = ppo.train(config)
    kept = sorted(path.parent.glob("iteration-*"))
    assert [directory.name for directory in kept] == ["iteration-000002", "iteration-000004"]
    assert distance(kept[1], path) == 0
    assert distance(kept[0], path) > 0


def test_figures_of_an_iteration(ppo_config, open_run, base, reward_model):
    """Reward, length and the share that ended, recomputed from the episodes."""
    run, actors, _ = collected(ppo_config(), open_run, base, reward_model)
    torch.manual_seed(7)
    examples = [PromptExample(ids, "") for ids in ([4, 5], [6], [7, 8, 9], [10])]
    episodes, figures = ppo.collect(run, actors, examples, range(len(examples)))
    scores = []
    for episode in episodes:
        batch = actors.rewards.model.lay_out([episode.group])
        scores.append(actors.rewards.model(batch, batch.last).item())
    assert figures["reward"] == pytest.approx(sum(scores) / 4, abs=1e-5)
    assert figures["response_tokens"] == sum(len(episode.response) for episode in episodes) / 4
    assert figures["ended"] == sum(episode.response[-1] == 1 for episode in episodes) / 4
    assert [episode.prompt for episode in episodes] == [[4, 5], [6], [7, 8, 9], [10]]


def test_run_directory(ppo_config):
    config = ppo_config(episodes=32)
    path = ppo.train(config)
    names = {item.name for item in path.parent.iterdir()}
    assert names >= {"config.yaml", "inputs.yaml", "metrics.jsonl", "tensorboard", "report.md", "curves.png", "model"}
    assert "largest deviation of the ratio from 1 before an update" in (path.parent / "report.md").read_text()
    assert not any(name.endswith(".tmp") for name in names)
