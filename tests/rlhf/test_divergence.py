"""A run whose figures become NaN stops at that step with one line of error, and can go on from a checkpoint."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from tools import metrics, only_line

from rlhf import ppo, reward, sft
from rlhf.loading import load_tokenizer
from rlhf.models import LanguageModel, ScalarModel

NAN = float("nan")
RATES = {"sft": ["adam"], "reward": ["adam"], "ppo": ["adam", "value_adam"]}


@pytest.fixture
def command(base, reward_model, data, tmp_path):
    """A stage's command, of eight steps and more, with a checkpoint every two."""

    def make(stage, rate):
        lines = {
            "sft": ["--model", base, "--data", data.demonstrations, "--epochs", 2, "--batch_size", 8],
            "reward": ["--model", base, "--data", data.comparisons, "--epochs", 2, "--batch_size", 6],
            "ppo": ["--policy", base, "--reward_model", reward_model, "--prompts", data.prompts, "--episodes", 64],
        }
        short = ["--batch_size", 8, "--minibatch_size", 8, "--lengths.max_response_tokens", 6]
        rates = [word for adam in RATES[stage] for word in (f"--{adam}.learning_rate", rate)]
        common = ["--checkpoint_every", 2, "--device", "cpu", "--output_dir", tmp_path / "run"]
        return [stage, *lines[stage], *(short if stage == "ppo" else []), *rates, *common]

    return make


# The module and the function that compute a quantity, how to spoil the result, and the quantity's name in the error.
QUANTITIES = {
    "sft loss": (sft, "language_model_step", lambda found: NAN, "loss"),
    "reward loss": (reward, "ranking_step", lambda found: (NAN, found[1]), "loss"),
    "ppo policy loss": (ppo, "policy_step", lambda found: found | {"policy_loss": float("inf")}, "policy loss"),
    "ppo value loss": (ppo, "value_step", lambda found: NAN, "value loss"),
}


def spoil(monkeypatch, module, name, change, step):
    """Changes the function's result at ``step``, but only the first time that the run gets there."""
    function = getattr(module, name)
    left = [True]

    def spoilt(run, *arguments, **options):
        found = function(run, *arguments, **options)
        if run.step == step and left:
            left.clear()
            return change(found)
        return found

    monkeypatch.setattr(module, name, spoilt)


@pytest.mark.parametrize("case", QUANTITIES)
def test_stops_at_that_step_and_goes_on(case, command, rlhf, monkeypatch, caplog, tmp_path):
    stage = case.split()[0]
    *where, named = QUANTITIES[case]
    spoil(monkeypatch, *where, step=5)
    code, error = rlhf(*command(stage, 1e-3))
    assert code == 1
    line = only_line(error)
    assert line.startswith(f"rlhf {stage}: error: step 5: the {named} is ")
    assert "checkpoint-000004 is intact" in line
    rates = " or ".join(f"--{adam}.learning_rate" for adam in RATES[stage])
    assert f"With a lower {rates}, --resume {tmp_path / 'run'} would go on from there" in line
    assert not (tmp_path / "run/model").exists()
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]

    code, error = rlhf(stage, "--resume", tmp_path / "run", "--adam.learning_rate", 5e-4)
    assert code == 0, error
    assert "adam.learning_rate was 0.001 and is 0.0005 from here on" in caplog.text
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(len(records)))
    assert records[4]["learning_rate"] < 0.7 * records[3]["learning_rate"]
    assert (tmp_path / "run/model").is_dir()


def test_pretraining_loss_that_is_not_finite(command, rlhf, data, monkeypatch):
    spoil(monkeypatch, ppo, "language_model_step", lambda found: NAN, step=1)
    mix = ["--gamma_ptx", 1.0, "--pretraining_data", data.texts, "--pretraining_tokens", 16]
    code, error = rlhf(*command("ppo", 1e-3), *mix)
    assert (code, "error: step 1: the pretraining loss is nan" in only_line(error)) == (1, True)


def test_a_checkpoint_whose_next_step_fails_is_no_good_one(command, rlhf, monkeypatch, tmp_path):
    spoil(monkeypatch, sft, "language_model_step", lambda found: NAN, step=4)
    code, error = rlhf(*command("sft", 1e-3))
    assert (code, "checkpoint-000002 is intact" in only_line(error)) == (1, True)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-000002"]
    assert rlhf("sft", "--resume", tmp_path / "run")[0] == 0


def test_gradient_that_is_not_finite_changes_no_weight(sft_config, open_run, base, monkeypatch):
    from rlhf.training import RunError, make_optimizer, optimizer_step

    config = sft_config()
    run = open_run("sft", config)
    model = LanguageModel.load(base)
    before = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    with pytest.raises(RunError, match="step 0: the gradient norm is"):
        optimizer_step(run, model, make_optimizer(model, config.adam), config.adam, 1.0)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_learning_rate_that_is_far_too_high(stage, command, rlhf, tmp_path):
    """Whatever becomes NaN first, no model is saved, and the run can start again with a sensible rate."""
    code, error = rlhf(*command(stage, 1e30))
    assert code == 1
    assert only_line(error).startswith(f"rlhf {stage}: error: step ")
    assert not (tmp_path / "run/model").exists()
    rates = [word for adam in RATES[stage] for word in (f"--{adam}.learning_rate", 1e-3)]
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):  # their weights are huge, but finite
        shutil.rmtree(checkpoint)
    assert rlhf(stage, "--resume", tmp_path / "run", *rates)[0] == 0
    assert (tmp_path / "run/model").is_dir()


def spoilt_reward_model(reward_model, path):
    model = ScalarModel.load(reward_model)
    torch.nn.init.constant_(model.head.weight, 3e38)  # finite, or it would not be loaded; its products are not
    model.save(path, load_tokenizer(reward_model))
    return str(path)


def test_nan_from_the_reward_model_names_the_prompt(command, rlhf, reward_model, tmp_path):
    arguments = command("ppo", 1e-3)
    arguments[arguments.index("--reward_model") + 1] = spoilt_reward_model(reward_model, tmp_path / "spoilt")
    code, error = rlhf(*arguments)
    assert code == 1
    line = only_line(error)
    assert re.match("rlhf ppo: error: step 0: the reward model gives (nan|-?inf) for the prompt 'w", line)
    assert line.endswith("; there is no checkpoint yet")


def test_weights_that_are_nan_are_no_model(command, rlhf, base, tmp_path):
    model = LanguageModel.load(base)
    torch.nn.init.constant_(next(model.parameters()), NAN)
    model.save(tmp_path / "spoilt", load_tokenizer(base))
    arguments = command("sft", 1e-3)
    arguments[arguments.index("--model") + 1] = tmp_path / "spoilt"
    code, error = rlhf(*arguments)
    assert code == 2
    line = only_line(error)
    assert f"{tmp_path / 'spoilt'}: has weights that are NaN or infinite: " in line
    assert "(1 in all)" in line
    assert not (tmp_path / "run").exists()
