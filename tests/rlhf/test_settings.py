"""Every setting reaches the one place that it is for: none is dropped or given to another part.

All values below differ, so that a value in a wrong place shows. ``test_every_setting_is_watched`` fails for a new
setting that has no line here.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tools import WORDS, metrics

from rlhf import ppo, reward, sft, training
from rlhf.average import MovingAverage
from rlhf.config import Adam, PPOConfig, RewardConfig, SFTConfig
from rlhf.data import Example, Limits, read_comparisons, tokenize_comparisons
from rlhf.demo.pretrain import make_tokenizer
from rlhf.loading import ModelError, load_tokenizer
from rlhf.models import LanguageModel, ScalarModel
from rlhf.settings import as_plain, flatten

# Settings whose effect another file tests, and that file.
ELSEWHERE = {
    "output_dir": "test_cli", "seed": "test_sft", "checkpoint_every": "test_resume", "tokens_per_forward": "test_sft",
    "mixed_precision": "test_python", "tokenizer": "test_python", "device": "test_cli", "model": "test_sft",
    "data": "test_sft", "held_out_fraction": "test_sft", "demonstrations": "test_reward", "policy": "test_ppo",
    "reward_model": "test_ppo", "value_model": "test_rewards", "reward": "test_rewards", "prompts": "test_ppo",
    "reward_weights": "test_rewards", "missing_eos_penalty": "test_rewards", "pretraining_data": "test_ppo",
    "pretraining_fraction": "test_sft", "residual_dropout": "test_sft", "keep_every": "test_ppo",
    "epochs": "test_sft", "learning_rate": "test_sft", "gradient_checkpointing": "test_memory",
    "frozen_dtype": "test_memory", "sharding": "test_sharding",
    "rank": "test_lora", "alpha": "test_lora", "dropout": "test_lora", "target_modules": "test_lora",
    "merge": "test_lora", "rollout": "test_paged", "liger": "test_liger",
}  # fmt: skip


def watch(monkeypatch, calls, module, *names):
    """Records the arguments with which functions of a module are called."""
    for name in names:
        function = getattr(module, name)

        def kept(*arguments, _name=name, _function=function, **options):
            calls[_name].append((arguments, options))
            return _function(*arguments, **options)

        monkeypatch.setattr(module, name, kept)


@pytest.fixture
def watched_ppo(ppo_config, monkeypatch):
    """A run of PPO with a different value for every setting, and the calls that it made."""
    calls = defaultdict(list)
    watch(monkeypatch, calls, ppo, "sample", "ppo_advantages", "linear_ppo_policy_loss", "linear_selective_log_softmax")
    watch(
        monkeypatch, calls, ppo, "ppo_value_loss", "make_optimizer", "optimizer_step", "MovingAverage", "batch_indices"
    )
    watch(
        monkeypatch, calls, ppo, "language_model_step", "tokenize_prompts", "pretraining_examples", "warmup_from_tenth"
    )
    watch(monkeypatch, calls, training, "batch_indices")
    watch(monkeypatch, calls, MovingAverage, "update")
    config = ppo_config(
        episodes=36,
        batch_size=12,
        minibatch_size=4,
        inner_epochs=2,
        kl_coefficient=0.31,
        kl_estimator="k3",
        gamma=0.97,
        lam=0.83,
        whiten_advantages=False,
        clip_range=0.11,
        value_clip_range=0.43,
        temperature=0.9,
        warmup_iterations=5,
        adam=Adam(1.1e-4, beta1=0.81, beta2=0.82, eps=1.3e-5, max_grad_norm=0.71),
        value_adam=Adam(2.2e-4, beta1=0.83, beta2=0.84, eps=1.7e-5, max_grad_norm=0.73),
        ema_decay=0.61,
        gamma_ptx=3.7,
        pretraining_per_episode=3,
        pretraining_tokens=10,
        lengths={"max_prompt_tokens": 14, "max_response_tokens": 7},
        rollout_batch_size=5,
        attention="eager",
    )
    ppo.train(config)
    return SimpleNamespace(config=config, calls=calls)


def all_of(calls, name, option):
    """The values that an option had in every call."""
    assert calls[name], name
    return {options[option] for _, options in calls[name]}


def test_ppo_settings(watched_ppo):
    config, calls = watched_ppo.config, watched_ppo.calls
    assert all_of(calls, "sample", "temperature") == {0.9}
    assert all_of(calls, "sample", "max_new_tokens") == {7}
    assert all_of(calls, "sample", "batch_size") == {5}
    assert len(calls["sample"]) == 36 // 12
    assert {len(arguments[1]) for arguments, _ in calls["sample"]} == {12}
    for option, value in {"beta": 0.31, "estimator": "k3", "gamma": 0.97, "lam": 0.83, "whiten": False}.items():
        assert all_of(calls, "ppo_advantages", option) == {value}, option
    assert all_of(calls, "linear_ppo_policy_loss", "clip_range") == {0.11}
    assert all_of(calls, "linear_ppo_policy_loss", "temperature") == {0.9}
    assert all_of(calls, "linear_selective_log_softmax", "temperature") == {0.9}
    assert all_of(calls, "ppo_value_loss", "clip_range") == {0.43}
    steps = 36 // 4 * 2
    assert len(calls["linear_ppo_policy_loss"]) == len(calls["ppo_value_loss"]) == steps
    limits = calls["tokenize_prompts"][0][0][2]
    assert (limits.max_prompt_tokens, limits.max_response_tokens, limits.context_length) == (14, 7, 64)
    assert calls["pretraining_examples"][0][0][2] == 10

    # Each model has its own optimizer, and each optimizer its own settings, factor and turn.
    (policy, adam), (value, value_adam) = (arguments for arguments, _ in calls["make_optimizer"])
    assert (type(policy), type(value)) == (LanguageModel, ScalarModel)
    assert (adam, value_adam) == (config.adam, config.value_adam)
    assert policy.model.config._attn_implementation == value.model.config._attn_implementation == "eager"
    taken = [arguments[1:] for arguments, _ in calls["optimizer_step"]]
    assert len(taken) == 2 * steps
    for i, (model, optimizer, settings, factor) in enumerate(taken):
        group = optimizer.param_groups[0]
        assert model is (policy if i % 2 == 0 else value)
        assert settings is (config.adam if i % 2 == 0 else config.value_adam)
        assert (group["betas"], group["eps"]) == ((settings.beta1, settings.beta2), settings.eps)
        assert factor == pytest.approx(0.1 + 0.9 * (i // (2 * 6)) / 5)
    ((averaged, decay), _), *more = calls["MovingAverage"]
    assert (averaged is policy, decay, more) == (True, 0.61, [])
    assert len(calls["update"]) == steps
    assert all_of(calls, "language_model_step", "weight") == {3.7}
    assert {len(arguments[2]) for arguments, _ in calls["language_model_step"]} == {4 * 3}
    assert {len(e.prompt_ids + e.completion_ids) for call in calls["language_model_step"] for e in call[0][2]} == {10}


def test_learning_rate_and_norm_are_those_of_the_group(sft_config, open_run, base):
    """``optimizer_step`` multiplies the rate by the factor, and scales gradients down to the norm."""
    run, model = open_run("sft", sft_config()), LanguageModel.load(base)
    adam = Adam(2e-3, max_grad_norm=0.5)
    optimizer = training.make_optimizer(model, adam)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norms = []
    optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
    )
    before = training.optimizer_step(run, model, optimizer, adam, 0.25)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    assert norms == [pytest.approx(0.5, rel=1e-4)]
    assert before == pytest.approx(sum(p.numel() for p in model.parameters()) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_sft_and_reward_settings(stage, sft_config, reward_config, monkeypatch):
    calls = defaultdict(list)
    module = {"sft": sft, "reward": reward}[stage]
    read = {"sft": "tokenize_demonstrations", "reward": "tokenize_comparisons"}[stage]
    step = {"sft": "language_model_step", "reward": "ranking_step"}[stage]
    watch(monkeypatch, calls, module, read, step, "make_optimizer", "optimizer_step", "cosine_to_tenth")
    config = {"sft": sft_config, "reward": reward_config}[stage](
        epochs=2,
        batch_size=7,
        adam=Adam(1.1e-4, beta1=0.81, beta2=0.82, eps=1.3e-5, max_grad_norm=0.71),
        lengths={"max_prompt_tokens": 14, "max_response_tokens": 6},
        attention="eager",
        **({"pretraining_tokens": 11} if stage == "sft" else {}),
    )
    module.train(config)
    steps = -(-2 * (40 if stage == "sft" else 24) // 7)
    assert len(calls[step]) == len(metrics(Path(config.output_dir))) == steps
    assert [len(arguments[2]) for arguments, _ in calls[step]][:-1] == [7] * (steps - 1)
    limits = calls[read][0][0][2]
    assert (limits.max_prompt_tokens, limits.max_response_tokens, limits.context_length) == (14, 6, 64)
    model, adam = calls["make_optimizer"][0][0]
    assert adam is config.adam
    assert model.model.config._attn_implementation == "eager"
    assert all(arguments[3] is config.adam for arguments, _ in calls["optimizer_step"])
    assert [arguments for arguments, _ in calls["cosine_to_tenth"]] == [(i, steps) for i in range(steps)]
    for i, (arguments, _) in enumerate(calls["optimizer_step"]):
        assert arguments[4] == sft.cosine_to_tenth(i, steps)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_device_and_attention_reach_every_model(
    stage, sft_config, reward_config, ppo_config, base, reward_model, tmp_path, monkeypatch
):
    """The dropout reaches only the model of SFT."""
    calls = defaultdict(list)
    for kind in (LanguageModel, ScalarModel):
        watch(monkeypatch, calls, kind, "load")
    monkeypatch.setattr(training.Run, "device", torch.device("cpu", 0))
    value_model = str(shutil.copytree(reward_model, tmp_path / "other"))
    common = {"attention": "eager", "device": torch.device("cpu", 0)}
    loaded = {
        "sft": [(base, {"residual_dropout": 0.13})],
        "reward": [(base, {})],
        "ppo": [(base, {}), (reward_model, {}), (value_model, {})],
    }[stage]
    if stage == "sft":
        sft.train(sft_config(epochs=1, attention="eager", residual_dropout=0.13))
    elif stage == "reward":
        reward.train(reward_config(epochs=1, attention="eager"))
    else:
        ppo.train(ppo_config(episodes=16, attention="eager", value_model=value_model))
    assert calls["load"] == [((source,), common | more) for source, more in loaded]


def test_what_is_not_trained_is_frozen(ppo_config, monkeypatch):
    calls = defaultdict(list)
    watch(monkeypatch, calls, ppo, "collect")
    ppo.train(ppo_config(episodes=16))
    actors = calls["collect"][0][0][1]
    for model, trained in ((actors.policy, True), (actors.value, True), (actors.reference, False)):
        assert {parameter.requires_grad for parameter in model.parameters()} == {trained}
    assert {parameter.requires_grad for parameter in actors.rewards.model.parameters()} == {False}


def test_policy_and_value_model_share_a_tokenizer(ppo_config, base, reward_model, tmp_path):
    other = str(shutil.copytree(reward_model, tmp_path / "other"))
    make_tokenizer([*WORDS[:-1], "another"]).save_pretrained(other)
    config = ppo_config(value_model=other)
    with pytest.raises(ModelError, match=rf"^the tokenizers of {base} and {other} differ"):
        ppo.train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_tokenizer_of_the_settings_comes_before_the_model_s(
    stage, sft_config, reward_config, ppo_config, base, tmp_path, monkeypatch
):
    """It reads the data, and is saved beside the result."""
    calls = defaultdict(list)
    module, config = {"sft": (sft, sft_config), "reward": (reward, reward_config), "ppo": (ppo, ppo_config)}[stage]
    watch(monkeypatch, calls, module, "load_tokenizer")
    other = load_tokenizer(base)
    other.model_max_length = 1234
    other.save_pretrained(tmp_path / "other")
    path = module.train(config(tokenizer=str(tmp_path / "other"), **({"episodes": 16} if stage == "ppo" else {})))
    assert [arguments for arguments, _ in calls["load_tokenizer"]] == [(str(tmp_path / "other"),)]
    assert load_tokenizer(str(path)).model_max_length == 1234


def test_every_setting_is_watched():
    """Every setting is named in a line of this file, or in the file that ``ELSEWHERE`` gives for it."""
    source = Path(__file__).read_text()
    stages = [
        SFTConfig(output_dir="o", model="m", data="d"),
        RewardConfig(output_dir="o", model="m", data="d"),
        PPOConfig(output_dir="o", policy="p", reward_model="r", prompts="q"),
    ]
    here = Path(__file__).parent
    for config in stages:
        for name in flatten(as_plain(config)):
            last = name.rpartition(".")[2]
            if last in ELSEWHERE:
                assert last in (here / f"{ELSEWHERE[last]}.py").read_text(), name
            else:
                assert last in source, name


# Several processes ---------------------------------------------------------------------------------------------------


class TwoAlike:
    """Two processes with the same data: averaged gradients stay the same, and sums are doubled."""

    count = 2

    def sum(self, value):
        return 2 * torch.as_tensor(value)


def gradients(model):
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


def losses(kind, run, base, reward_model, data, prompts):
    """A stage's gradient, and the figure that it reports, of a batch of ``prompts`` in all processes."""
    tokenizer = load_tokenizer(base)
    if kind == "sft":
        model = LanguageModel.load(base).eval()
        examples = [Example([5, 6], [7, 8, 9]), Example([10], [11, 12])]
        return sft.language_model_step(run, model, examples, weight=3.0), gradients(model)
    if kind == "reward":
        model = ScalarModel.load(reward_model).eval()
        compared = tokenize_comparisons(read_comparisons(data.comparisons), tokenizer, Limits(16, 16, 64))[:4]
        return reward.ranking_step(run, model, compared, prompts=prompts), gradients(model)
    episodes = [
        ppo.Episode([5, 6], ids, *(torch.linspace(-2, 1, len(ids)) * scale for scale in (1.0, 0.2, 1.5, 0.7)))
        for ids in ([7, 8, 9], [10, 11, 12, 13, 14])
    ]
    if kind == "policy":
        model = LanguageModel.load(base).eval()
        figures = ppo.policy_step(run, model, episodes)
        del figures["ratio_max_deviation"]
        return tuple(figures.values()), gradients(model)
    model = ScalarModel.load(reward_model).eval()
    return ppo.value_step(run, model, episodes), gradients(model)


@pytest.mark.parametrize("tokens_per_forward", [16384, 8])
@pytest.mark.parametrize("kind", ["sft", "reward", "policy", "value"])
def test_gradient_of_two_processes_is_that_of_one(
    kind, tokens_per_forward, ppo_config, open_run, base, reward_model, data, monkeypatch
):
    """Both processes have the same batch, so the mean over both batches has the gradient of one batch alone."""
    run = open_run("ppo", ppo_config(tokens_per_forward=tokens_per_forward))
    alone, expected = losses(kind, run, base, reward_model, data, prompts=4)
    monkeypatch.setattr(run, "processes", TwoAlike())
    both, found = losses(kind, run, base, reward_model, data, prompts=8)
    assert both == pytest.approx(alone, rel=1e-5)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sft", "reward", "policy", "value"])
def test_processes_wait_for_each_other_once_a_step(kind, ppo_config, open_run, base, reward_model, data, monkeypatch):
    """All parts but the last run under ``no_sync``, with the model that is trained."""
    run = open_run("ppo", ppo_config(tokens_per_forward=7))
    kept_back = []

    def no_sync(model):
        kept_back.append(type(model))
        return contextlib.nullcontext()

    monkeypatch.setattr(run.accelerator, "no_sync", no_sync)
    losses(kind, run, base, reward_model, data, prompts=4)
    model = LanguageModel if kind in ("sft", "policy") else ScalarModel
    assert kept_back == [model] * (3 if kind == "reward" else 1)


# Onto the disk -------------------------------------------------------------------------------------------------------


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(sft_config, monkeypatch, tmp_path):
    """Otherwise a power cut could leave a directory with that name but without its content."""
    flushed: set[Path] = set()
    flush, rename = training.flush, Path.rename
    published = []

    def kept(path):
        flushed.add(Path(path))
        flush(path)

    def renamed(self, target):
        if self.name.endswith(".tmp") and self.is_dir():
            missing = {path for path in [*self.rglob("*"), self] if path not in flushed}
            assert not missing
            published.append(Path(target))
        return rename(self, target)

    monkeypatch.setattr(training, "flush", kept)
    monkeypatch.setattr(Path, "rename", renamed)
    sft.train(sft_config(epochs=1, checkpoint_every=2))
    assert [path.name for path in published] == ["checkpoint-000002", "checkpoint-000004", "model"]
    assert {path.parent for path in published} <= flushed
