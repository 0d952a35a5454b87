"""Two processes that each hold half of every weight do what one process does, and go on where others stopped."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from model_types import tiny
from test_resume import arguments
from tools import begin_together, metrics, model_files, only_line, run_here, together, weights

STAGES = ["sft", "reward", "ppo", "ppo-ptx", "ppo with lora"]


def command(stage, base, reward_model, data, *more):
    """The short run of a stage. Its last batches are smaller than the others, and parts are small."""
    stage, _, adapter = stage.partition(" with ")
    settings = arguments(stage, base, reward_model, data)
    # A key's bias has a gradient of rounding alone. With a smaller ε Adam would make steps of that.
    own = {
        "sft": ["--epochs", 2, "--residual_dropout", 0, "--adam.eps", 1e-5],
        "reward": ["--epochs", 2, "--batch_size", 5, "--adam.eps", 1e-5],
    }
    steps = own.get(stage, ["--episodes", 24, "--ema_decay", 0.5])
    steps += ["--lora.rank", 4, "--lora.merge", "true", "--adam.learning_rate", 0.01] if adapter else []
    return [*settings, *steps, "--tokens_per_forward", 48, *more]


def assert_same(ours, theirs):
    """Both directories have the run of the same steps, to rounding."""
    for mine, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)
    expected = weights(theirs)
    assert weights(ours).keys() == expected.keys()
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def one(tmp_path_factory, base, reward_model, data):
    """The directory of a stage's run by one process."""
    done = {}

    def make(stage):
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp(stage) / "one"
            assert run_here(*command(stage, base, reward_model, data), "--output_dir", done[stage]) == 0
        return done[stage]

    return make


@pytest.mark.long_for(stage=["sft", "reward", "ppo-ptx", "ppo with lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_stages(stage, one, base, reward_model, data, tmp_path):
    settings = command(stage, base, reward_model, data, "--sharding", "full", "--output_dir", tmp_path / "two")
    for error, status, held in together(*settings):
        assert status == 0, error
        assert len(json.loads(held)) == {"ppo": 4, "ppo-ptx": 4, "ppo with lora": 2}.get(stage, 1)
        assert max(json.loads(held)) <= 0.55
    assert_same(tmp_path / "two", one(stage))


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "jamba"])
def test_types(model_type, tokenizer, data, tmp_path):
    """Blocks of two kinds, experts that not every process uses, and states in place of a cache."""
    tiny(model_type, len(tokenizer), tokenizer.eos_token_id, scale=2.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = command("ppo", tmp_path / "model", None, data, "--reward", "lengths:length", "--adam.eps", 1e-4)
    at = settings.index("--reward_model")
    del settings[at : at + 2]
    (tmp_path / "lengths.py").write_text(
        "def length(completions, **_):\n    return [len(c) / 10 for c in completions]\n"
    )
    for count in (1, 2):
        for error, status, _ in together(
            *settings, "--sharding", "full", "--output_dir", tmp_path / str(count), processes=count,
            PYTHONPATH=str(tmp_path),
        ):  # fmt: skip
            assert status == 0, error
    assert_same(tmp_path / "2", tmp_path / "1")


def test_rollout_block_by_block(one, base, reward_model, data, tmp_path):
    """Where there is no room for whole weights, blocks gather theirs for every token."""
    settings = command("ppo", base, reward_model, data, "--sharding", "full", "--output_dir", tmp_path / "two")
    for error, status, _ in together(*settings, NO_ROOM="1"):
        assert status == 0, error
    assert_same(tmp_path / "two", one("ppo"))


@pytest.mark.long_for(first=[1])
@pytest.mark.parametrize("first", [1, 2])
def test_resumed_with_another_number_of_processes(first, one, base, reward_model, data, tmp_path):
    """Stopped at a checkpoint by one process, and gone on with by two of half the weights; and the other way round."""
    settings = command("ppo-ptx", base, reward_model, data, "--checkpoint_every", 1)
    sharding = [["--sharding", "none"], ["--sharding", "full"]]
    stopped = tmp_path / "run"
    for error, status, _ in together(
        *settings, *sharding[first - 1], "--output_dir", stopped, processes=first, STOP_AFTER="2"
    ):
        assert status == 0, error
    assert not (stopped / "model").exists()
    assert (stopped / "checkpoint-000002").exists()
    for error, status, _ in together(
        *settings, *sharding[2 - first], "--output_dir", stopped, "--resume", processes=3 - first
    ):
        assert status == 0, error
    assert_same(stopped, one("ppo-ptx"))


def killed_at(step, *settings):
    """Runs two processes, and kills one of them (by turns) once the metrics hold that many lines."""
    file = Path(settings[settings.index("--output_dir") + 1]) / "metrics.jsonl"
    started = begin_together(*settings)
    victim = started[step % 2]
    try:
        while victim.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= step):
            time.sleep(0.002)
        victim.kill()
        _, error = started[1 - step % 2].communicate(timeout=60)
        assert victim.wait() == -signal.SIGKILL
        return error, started[1 - step % 2].returncode
    finally:
        for process in started:
            process.kill()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_kill_of_one_process_ends_the_other_and_loses_nothing(base, reward_model, data, tmp_path):
    """After ten of them the run ends with the bits of the run that nobody killed."""
    kills = 10
    settings = command("ppo-ptx", base, reward_model, data, "--sharding", "full", "--checkpoint_every", 2)
    settings += ["--episodes", 8 * 4 * (kills + 1)]
    for error, status, _ in together(*settings, "--output_dir", tmp_path / "whole"):
        assert status == 0, error
    draw = random.Random(0)
    for kill in range(kills):
        step = draw.randint(4 * kill + 1, 4 * kill + 4)
        error, status = killed_at(step, *settings, "--output_dir", tmp_path / "killed", "--resume")
        assert status == 1, error
        assert "another process" in only_line(error)
    for error, status, _ in together(*settings, "--output_dir", tmp_path / "killed", "--resume"):
        assert status == 0, error
    assert model_files(tmp_path / "killed") == model_files(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_evaluate(rlhf, base, one, reward_model, data, tmp_path):
    settings = ["evaluate", "--model", one("sft"), "--baseline", base, "--judge", reward_model, "--device", "cpu"]
    settings += ["--prompts", data.prompts, "--pretraining_data", data.texts, "--pretraining_tokens", 16]
    settings += ["--lengths.max_response_tokens", 8, "--tokens_per_forward", 64]
    assert rlhf(*settings, "--output_dir", tmp_path / "one")[0] == 0
    for error, status, held in together(*settings, "--sharding", "full", "--output_dir", tmp_path / "two"):
        assert status == 0, error
        assert held != "[]"
    ours, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    for mine, theirs in zip(
        [*ours["models"], ours["baseline"]], [*expected["models"], expected["baseline"]], strict=True
    ):
        assert mine.keys() == theirs.keys() >= {"reward", "pretraining_loss"}
        for figure, value in theirs.items():
            assert mine.pop(figure) == (value if figure == "name" else pytest.approx(value, rel=1e-4))
    settings = {"output_dir": str(tmp_path / "two"), "sharding": "full"}
    assert ours.pop("settings") == expected.pop("settings") | settings
    assert ours == {**expected, "models": [{}], "baseline": {}}
    written = [(tmp_path / name / "completions.jsonl").read_text().splitlines() for name in ("two", "one")]
    for mine, theirs in zip(*(map(json.loads, lines) for lines in written), strict=True):
        assert mine.pop("rewards") == pytest.approx(theirs.pop("rewards"), rel=1e-4, abs=1e-5)
        assert mine == theirs


@pytest.mark.long
def test_generate(rlhf, base, data, tmp_path):
    settings = ["generate", "--model", base, "--prompts", data.prompts, "--samples", 3, "--device", "cpu"]
    settings += ["--lengths.max_response_tokens", 8]
    assert rlhf(*settings, "--output_dir", tmp_path / "one")[0] == 0
    for error, status, _ in together(*settings, "--sharding", "full", "--output_dir", tmp_path / "two", NO_ROOM="1"):
        assert status == 0, error
    assert (tmp_path / "two/completions.jsonl").read_bytes() == (tmp_path / "one/completions.jsonl").read_bytes()
