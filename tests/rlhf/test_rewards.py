"""Rewards from Python functions, their sum with a reward model's, and the value model beside them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tools import metrics, only_line, write_jsonl
from transformers import PreTrainedTokenizerFast

from rlhf import ppo
from rlhf.checkpoints import RunError
from rlhf.config import Adam, PPOConfig
from rlhf.data import PromptExample
from rlhf.loading import load_tokenizer
from rlhf.models import ScalarModel
from rlhf.rewards import RewardError, Rewards, check_finite, load_functions
from rlhf.settings import ConfigError


def count_w05(prompts, completions, **fields):
    return [float(completion.split().count("w05")) for completion in completions]


def length(prompts, completions, **fields):
    return [len(completion.split()) for completion in completions]


def rewards(tokenizer, functions, weights=None, model=None):
    named = {function.__name__: function for function in functions}
    weights = weights or [1.0] * (len(functions) + (model is not None))
    return Rewards(model, named, weights, tokenizer, frozenset({tokenizer.eos_token_id}))


def ids(tokenizer, text):
    return tokenizer(text).input_ids


def test_a_word_is_learnt(ppo_config):
    """Trained by PPO on a function that counts a word, the policy says that word more often."""
    config = ppo_config(
        reward_model=None,
        reward="test_rewards:count_w05",
        episodes=32 * 30,
        batch_size=32,
        minibatch_size=16,
        adam=Adam(3e-3, eps=1e-5),
        value_adam=Adam(3e-3, eps=1e-5),
        kl_coefficient=0.0,
    )
    ppo.train(config)
    reward = [record["reward"] for record in metrics(Path(config.output_dir))]
    assert sum(reward[-5:]) / 5 > 5 * max(0.05, sum(reward[:5]) / 5)


def test_what_a_function_is_called_with(ppo_config, tmp_path):
    """It gets prompts as the records have them, texts without their end token, and the records' further fields."""
    records = [{"prompt": f"w{i:02d}", "answer": i, "source": "made"} for i in range(8)] + [{"prompt": "w09"}]
    seen = []

    def keep(**columns):
        seen.append(columns)
        return [0.0] * len(columns["prompts"])

    config = ppo_config(
        prompts=write_jsonl(tmp_path / "prompts.jsonl", records), reward_model=None, reward=keep, episodes=18,
        batch_size=9, minibatch_size=9,
    )  # fmt: skip
    ppo.train(config)
    assert len(seen) == 2
    for columns in seen:
        assert set(columns) == {"prompts", "completions", "answer", "source"}
        rows = sorted(zip(*(columns[name] for name in ("prompts", "answer", "source")), strict=True))
        assert rows == [(f"w{i:02d}", i, "made") for i in range(8)] + [("w09", None, None)]
        assert all("<eos>" not in completion for completion in columns["completions"])
        assert any(columns["completions"])


def test_rewards_add_up_with_their_weights(tokenizer):
    responses = [[*ids(tokenizer, "w05 w05 w07"), tokenizer.eos_token_id], ids(tokenizer, "w01")]
    prompts = [PromptExample([1], "a"), PromptExample([2], "b")]
    total = rewards(tokenizer, [count_w05, length], [10.0, 0.5], None).total(None, prompts, responses)
    assert total.tolist() == [20 + 1.5, 0 + 0.5]
    with_model = rewards(tokenizer, [count_w05], [2.0, 10.0], "a model")
    assert with_model.total(torch.tensor([1.0, -3.0]), prompts, responses).tolist() == [22.0, -6.0]


def test_weights_reach_the_run(ppo_config, tmp_path):
    """The first samples of both runs are the same, so the reward is 3 times the model's less 2 times the length."""
    means = []

    def length_kept(completions, **_):
        found = [len(completion.split()) for completion in completions]
        means.append(sum(found) / len(found))
        return found

    ppo.train(ppo_config("plain", episodes=16))
    ppo.train(ppo_config("both", episodes=16, reward=length_kept, reward_weights=[3.0, -2.0]))
    first, second = metrics(tmp_path / "plain")[0], metrics(tmp_path / "both")[0]
    assert second["reward"] == pytest.approx(3 * first["reward"] - 2 * means[0], abs=1e-4)


def test_missing_eos_penalty(ppo_config, tmp_path):
    """It is subtracted for each completion that the limit cut off."""
    for name, penalty in (("without", 0.0), ("with", 4.0)):
        ppo.train(ppo_config(name, episodes=16, missing_eos_penalty=penalty))
    without, penalised = metrics(tmp_path / "without")[0], metrics(tmp_path / "with")[0]
    assert 0 < without["ended"] < 1
    assert penalised["reward"] == pytest.approx(without["reward"] - 4.0 * (1 - without["ended"]), abs=1e-4)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda **_: [1.0], "the reward .* returned 1 values for 2 completions"),
        (lambda **_: "12", "the reward .* returned '12', must be a list of numbers, one a completion"),
        (lambda **_: {"a": 1, "b": 2}, "the reward .* returned .*, must be a list of numbers"),
        (lambda **_: None, "the reward .* returned None, must be a list of numbers"),
        (lambda **_: 1 / 0, "the reward .* failed: ZeroDivisionError: division by zero"),
        (lambda **_: sys.exit("no server"), "the reward .* failed: SystemExit: no server"),
        (lambda **_: ["1.0", 1.0], "returned '1.0', which is no number, for the prompt 'a'"),
        (lambda **_: [1.0, None], "returned None, which is no number, for the prompt 'b'"),
        (lambda **_: [float("nan"), 1.0], "gives nan for the prompt 'a'"),
        (lambda **_: [1.0, float("-inf")], "gives -inf for the prompt 'b'"),
        (lambda prompts: [1.0, 1.0], "failed: TypeError: .*unexpected keyword argument 'completions'"),
    ],
)
def test_what_a_function_may_not_do(tokenizer, function, says):
    prompts = [PromptExample([1], "a"), PromptExample([2], "b")]
    with pytest.raises(RewardError, match=says):
        rewards(tokenizer, [function]).total(None, prompts, [[3], [4]])


def test_a_long_prompt_is_shown_short():
    with pytest.raises(RewardError) as error:
        check_finite("it", torch.tensor([float("nan")]), [PromptExample([1], [{"role": "user", "content": "x" * 500}])])
    assert len(str(error.value)) < 130


def test_function_of_the_current_directory(rlhf, base, data, tmp_path, monkeypatch):
    """A console script must find it there too, although Python looks only in the script's own directory."""
    (tmp_path / "my_reward_module.py").write_text(
        "def mine(prompts, completions, **_):\n    return [1] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    short = ["--episodes", 8, "--batch_size", 8, "--minibatch_size", 8, "--lengths.max_response_tokens", 4]
    command = ["ppo", "--policy", base, "--prompts", data.prompts, "--output_dir", tmp_path / "run", *short]
    code, error = rlhf(*command, "--reward", "my_reward_module:mine", "--device", "cpu")
    assert code == 0, error
    assert metrics(tmp_path / "run")[0]["reward"] == 1.0


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nowhere:mine", "reward: 'nowhere:mine' names no Python function: ModuleNotFoundError"),
        ("json:mine", "reward: 'json:mine' names no Python function: AttributeError"),
        ("json:__name__", "reward: 'json:__name__' is str, not a function"),
        ("json", "reward: is 'json', must be module:function"),
        ("rewards/mine.py:count", "reward: is 'rewards/mine.py:count', must name a module: rewards.mine:count"),
    ],
)
def test_no_such_function(rlhf, base, data, tmp_path, value, says):
    command = ["ppo", "--policy", base, "--prompts", data.prompts, "--output_dir", tmp_path / "run"]
    code, error = rlhf(*command, "--reward", value)
    assert code == 2
    assert only_line(error).startswith(f"rlhf ppo: error: {says}")
    assert not (tmp_path / "run").exists()


def test_a_function_that_fails_in_the_middle_of_a_run(ppo_config):
    """The error names the step and the checkpoint from which the run can go on."""
    calls = []

    def tired(completions, **_):
        calls.append(len(completions))
        return [1.0 if len(calls) < 4 else "none"] * len(completions)

    config = ppo_config(reward_model=None, reward=tired, episodes=80, batch_size=8, checkpoint_every=2)
    with pytest.raises(RunError, match=r"step 3: tired returned 'none', .*; checkpoint-000002 is intact"):
        ppo.train(config)


def test_a_value_model_may_start_from_a_language_model(ppo_config, base, monkeypatch):
    started = []
    step = ppo.value_step
    monkeypatch.setattr(ppo, "value_step", lambda run, model, e: started.append(e[0].values) or step(run, model, e))
    ppo.train(ppo_config(value_model=base, episodes=16))
    assert torch.equal(started[0], torch.zeros_like(started[0]))


def test_a_reward_is_needed_and_a_weight_for_each():
    settings = {"output_dir": "o", "policy": "p", "prompts": "q"}
    with pytest.raises(ConfigError, match="reward_model: is None, must be given, or reward"):
        PPOConfig(**settings)
    with pytest.raises(ConfigError, match=r"reward_weights: is \[1.0\], must be 2 weights"):
        PPOConfig(**settings, reward_model="r", reward="a:b", reward_weights=[1.0])
    with pytest.raises(ConfigError, match=r"reward_weights: is \[nan\], must be a list of finite numbers or null"):
        PPOConfig(**settings, reward_model="r", reward_weights=[float("nan")])
    with pytest.raises(ConfigError, match="value_clip_range: is -1, must be above 0, or null"):
        PPOConfig(**settings, reward_model="r", value_clip_range=-1)
    with pytest.raises(ConfigError, match="missing_eos_penalty: is -1"):
        PPOConfig(**settings, reward_model="r", missing_eos_penalty=-1)


def weights(path):
    return load_file(Path(path) / "model.safetensors")


def test_value_model_is_kept_and_can_be_started_from(ppo_config, reward_model, tmp_path, monkeypatch):
    config = ppo_config("first", episodes=32)
    ppo.train(config)
    kept = tmp_path / "first/value"
    assert any(not torch.equal(weights(kept)[name], tensor) for name, tensor in weights(reward_model).items())
    loaded = []
    load = ScalarModel.load
    monkeypatch.setattr(
        ppo.ScalarModel, "load", lambda source, **options: loaded.append(source) or load(source, **options)
    )
    ppo.train(ppo_config("second", episodes=32, value_model=str(kept)))
    assert loaded == [reward_model, str(kept)]


def test_without_a_reward_model_values_start_at_zero(ppo_config, monkeypatch):
    started = []
    step = ppo.value_step

    def first(run, model, episodes):
        started.append(torch.cat([episode.values for episode in episodes]))
        return step(run, model, episodes)

    monkeypatch.setattr(ppo, "value_step", first)
    ppo.train(ppo_config(reward_model=None, reward=count_w05, episodes=16))
    assert torch.equal(started[0], torch.zeros_like(started[0]))


def test_two_rewards_of_one_name_both_count():
    settings = {"output_dir": "o", "policy": "p", "prompts": "q"}
    config = PPOConfig(**settings, reward=[lambda **_: [1.0], lambda **_: [2.0], "test_rewards:length"])
    found = load_functions(config)
    assert list(found) == ["<lambda>", "<lambda> (2)", "test_rewards:length"]
    assert [function() for function in list(found.values())[:2]] == [[1.0], [2.0]]


def test_reward_model_with_a_tokenizer_of_its_own(ppo_config, base, reward_model, tmp_path, monkeypatch, caplog):
    """Its vocabulary is in another order, and its embeddings as well, so that it gives the scores of the first."""
    ours = load_tokenizer(base)
    order = torch.randperm(len(ours), generator=torch.Generator().manual_seed(0))
    vocabulary = {token: order[i].item() for token, i in ours.get_vocab().items()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    model = ScalarModel.load(reward_model)
    with torch.no_grad():
        embeddings = model.model.get_input_embeddings().weight
        embeddings[order] = embeddings.clone()
    model.save(tmp_path / "other", theirs)
    found = []
    for name, source in (("same", reward_model), ("other", str(tmp_path / "other"))):
        config = ppo_config(name, reward_model=source, episodes=16, value_model=base)
        ppo.train(config)
        found.append(metrics(Path(config.output_dir))[0])
    assert found[1]["reward"] == pytest.approx(found[0]["reward"], rel=1e-5)
    assert 0 < found[0]["ended"] < 1
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)

    for limit in (8, 1):
        monkeypatch.setattr("rlhf.rewards.context_length", lambda config, limit=limit: limit)
        config = ppo_config(f"context of {limit}", reward_model=str(tmp_path / "other"), episodes=16)
        if limit == 8:
            ppo.train(config)
            assert re.search(
                r"the reward model reads \d+ of 16 completions only as far as its context of 8 goes", caplog.text
            )
        else:
            with pytest.raises(RunError, match=r"step 0: the reward model's tokenizer .* no room .* its context of 1"):
                ppo.train(config)
