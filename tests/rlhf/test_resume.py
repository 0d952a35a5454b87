"""A run that was killed at any moment, or stopped by a full disk, ends with the same weights when it is resumed."""

from __future__ import annotations

import errno
import random
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import yaml
from tools import metrics, model_files, only_line, run_here, start, stop_at_step_3

from rlhf import ppo, reward, sft
from rlhf.checkpoints import RunError
from rlhf.checkpoints import latest as latest_checkpoint

CHECKPOINT_EVERY = 4
STAGES = ["sft", "reward", "ppo", "ppo-ptx"]


def arguments(stage, base, reward_model, data):
    """The command of a stage, but for its output_dir. Each takes 30 to 60 steps."""
    common = ["--checkpoint_every", CHECKPOINT_EVERY, "--device", "cpu", "--seed", 3]
    if stage == "sft":
        files = ["--data", data.demonstrations, "--pretraining_data", data.texts]
        mix = ["--pretraining_fraction", 0.25, "--pretraining_tokens", 16, "--held_out_fraction", 0.1]
        return [
            "sft",
            "--model",
            base,
            *files,
            *mix,
            "--epochs",
            8,
            "--batch_size",
            8,
            "--adam.learning_rate",
            1e-3,
            *common,
        ]
    if stage == "reward":
        files = ["--data", data.comparisons, "--demonstrations", data.demonstrations]
        return [
            "reward",
            "--model",
            base,
            *files,
            "--epochs",
            10,
            "--batch_size",
            4,
            "--adam.learning_rate",
            1e-3,
            *common,
        ]
    models = ["--policy", base, "--reward_model", reward_model, "--prompts", data.prompts]
    sizes = ["--episodes", 240, "--batch_size", 8, "--minibatch_size", 4, "--lengths.max_response_tokens", 6]
    rates = ["--adam.learning_rate", 1e-3, "--value_adam.learning_rate", 1e-3]
    text = ["--pretraining_data", data.texts, "--pretraining_tokens", 16, "--pretraining_per_episode", 2]
    mix = ["--gamma_ptx", 2.0, *text] if stage == "ppo-ptx" else []
    return ["ppo", *models, *sizes, *rates, *mix, *common]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, base, reward_model, data):
    """A run of a stage that was killed by SIGKILL after a random step, and the same run without the kill."""
    done = {}

    def make(stage):
        if stage not in done:
            directory = tmp_path_factory.mktemp(stage)
            command = arguments(stage, base, reward_model, data)
            process = start(*command, "--output_dir", directory / "killed")
            step = random.Random(stage).randint(CHECKPOINT_EVERY + 1, 24)
            with ThreadPoolExecutor(1) as beside:
                kill = beside.submit(kill_after, process, directory / "killed" / "metrics.jsonl", step)
                assert run_here(*command, "--output_dir", directory / "whole") == 0
                kill.result()
            done[stage] = SimpleNamespace(
                directory=directory / "killed", whole=directory / "whole", command=command, step=step
            )
        return done[stage]

    return make


def kill_after(process, file, step):
    """Sends SIGKILL once the metrics hold ``step`` lines."""
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= step):
        time.sleep(0.002)
    process.kill()
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error


@pytest.fixture
def interrupted(killed, tmp_path):
    """A copy of the SFT run that was killed, which a test may change."""
    run = killed("sft")
    shutil.copytree(run.directory, tmp_path / "run")
    return SimpleNamespace(
        directory=tmp_path / "run", whole=run.whole, command=[*run.command, "--output_dir", tmp_path / "run"]
    )


@pytest.mark.long_for(stage=["sft", "ppo"])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_resumes_to_the_same_bits(killed, rlhf, tmp_path, stage):
    run = killed(stage)
    resumed = tmp_path / "resumed"
    shutil.copytree(run.directory, resumed)
    assert not (resumed / "model").exists()
    assert int(latest_checkpoint(resumed).name[-6:]) <= len(metrics(resumed))

    code, error = rlhf(*run.command, "--output_dir", resumed, "--resume")
    assert code == 0, error

    whole, again = model_files(run.whole), model_files(resumed)
    assert [name for name in whole if whole[name] != again[name]] == []
    steps = [record["step"] for record in metrics(resumed)]
    assert steps == list(range(len(steps)))
    assert metrics(resumed) == metrics(run.whole)
    assert [path.name for path in resumed.glob("checkpoint-*")] == [
        path.name for path in run.whole.glob("checkpoint-*")
    ]


@pytest.mark.long_for(stage=["sft", "ppo"])
@pytest.mark.parametrize("stage", STAGES)
def test_training_moved_the_weights(killed, base, reward_model, stage):
    """Otherwise the test above would only compare the model that both runs began with."""
    run = killed(stage)
    with open(f"{base}/model.safetensors", "rb") as file:
        assert (run.whole / "model" / "model.safetensors").read_bytes() != file.read()


def test_half_written_checkpoint_is_ignored_and_removed(interrupted, rlhf):
    """A kill in the middle of a write leaves the files of a later step, cut short."""
    last = latest_checkpoint(interrupted.directory)
    leftover = interrupted.directory / "checkpoint-000099.tmp"
    shutil.copytree(last, leftover)
    for path in leftover.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shutil.copytree(leftover, interrupted.directory / "model.tmp")
    assert latest_checkpoint(interrupted.directory) == last

    code, error = rlhf(*interrupted.command, "--resume")
    assert code == 0, error
    assert list(interrupted.directory.glob("*.tmp")) == []
    assert model_files(interrupted.directory) == model_files(interrupted.whole)


def test_checkpoint_not_yet_removed_beside_its_successor(interrupted, rlhf):
    """The run was killed after writing a checkpoint and before removing the one before it."""
    last = latest_checkpoint(interrupted.directory)
    shutil.copytree(last, interrupted.directory / "checkpoint-000001")
    assert latest_checkpoint(interrupted.directory) == last
    code, error = rlhf(*interrupted.command, "--resume")
    assert code == 0, error
    assert model_files(interrupted.directory) == model_files(interrupted.whole)
    assert len(list(interrupted.directory.glob("checkpoint-*"))) == 1


def test_cut_off_line_of_metrics(interrupted, rlhf):
    """The run was killed in the middle of writing a line."""
    path = interrupted.directory / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    code, error = rlhf(*interrupted.command, "--resume")
    assert code == 0, error
    assert metrics(interrupted.directory) == metrics(interrupted.whole)


def test_killed_before_the_first_checkpoint(interrupted, rlhf):
    shutil.rmtree(latest_checkpoint(interrupted.directory))
    code, error = rlhf(*interrupted.command, "--resume")
    assert code == 0, error
    assert model_files(interrupted.directory) == model_files(interrupted.whole)
    assert metrics(interrupted.directory) == metrics(interrupted.whole)


def test_full_disk(interrupted, rlhf):
    """No file may grow beyond 50 kB. Files of a checkpoint do, so the next one fails in the middle of a write."""
    last = latest_checkpoint(interrupted.directory)
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    limit = (50_000, resource.RLIM_INFINITY)
    process = start(
        *interrupted.command, "--resume", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    _, error = process.communicate()
    assert process.returncode == 1, error
    line = only_line(error)
    assert f"{last.name} is intact" in line
    assert "--resume" in line
    assert latest_checkpoint(interrupted.directory) == last
    assert {path.name: path.read_bytes() for path in last.iterdir()} == before
    assert list(interrupted.directory.glob("*.tmp")) == []

    code, error = rlhf(*interrupted.command, "--resume")
    assert code == 0, error
    assert model_files(interrupted.directory) == model_files(interrupted.whole)


@pytest.mark.parametrize("earlier", [True, False], ids=["second checkpoint", "first checkpoint"])
def test_no_space_left(interrupted, rlhf, monkeypatch, earlier):
    last = latest_checkpoint(interrupted.directory)
    if not earlier:
        shutil.rmtree(last)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.save", full)
        code, error = rlhf(*interrupted.command, "--resume")
    assert code == 1
    line = only_line(error)
    assert line.endswith("No space left on device")
    assert (f"{last.name} is intact" if earlier else "there is no checkpoint yet") in line
    assert latest_checkpoint(interrupted.directory) == (last if earlier else None)


def test_no_space_left_for_the_model(interrupted, rlhf, monkeypatch):
    """Training is done and only the last write fails: nothing is lost."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf.models.Backbone.save", full)
        code, error = rlhf(*interrupted.command, "--resume")
    assert code == 1
    assert "No space left on device" in only_line(error)
    assert not (interrupted.directory / "model").exists()
    code, error = rlhf(*interrupted.command, "--resume")
    assert code == 0, error
    assert model_files(interrupted.directory) == model_files(interrupted.whole)


@pytest.mark.parametrize("where", ["run", "run/below"])
def test_output_dir_is_a_file(killed, rlhf, tmp_path, where):
    (tmp_path / "run").write_text("in the way")
    code, error = rlhf(*killed("sft").command, "--output_dir", tmp_path / where)
    assert code == 1
    assert f"{tmp_path / where}: cannot be used for output: " in only_line(error)
    assert (tmp_path / "run").read_text() == "in the way"


def test_existing_run_is_not_overwritten(interrupted, rlhf):
    before = (interrupted.directory / "metrics.jsonl").read_bytes()
    code, error = rlhf(*interrupted.command)
    assert code == 1
    assert "--resume" in only_line(error)
    assert (interrupted.directory / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--seed", 4, "seed was 3 and is now 4"), ("--adam.beta2", 0.5, "adam.beta2 was 0.95 and is now 0.5")],
)
def test_changed_setting_is_refused(interrupted, rlhf, option, value, says):
    config = (interrupted.directory / "config.yaml").read_bytes()
    code, error = rlhf(*interrupted.command, option, value, "--resume")
    assert code == 1
    assert says in only_line(error)
    assert (interrupted.directory / "config.yaml").read_bytes() == config


def test_other_stage_is_refused(interrupted, killed, rlhf):
    code, error = rlhf(*killed("reward").command, "--output_dir", interrupted.directory, "--resume")
    assert code == 1
    assert "stage was 'sft' and is now 'reward'" in only_line(error)


def test_checkpoint_interval_may_change(interrupted, rlhf):
    code, error = rlhf(*interrupted.command, "--checkpoint_every", 1000, "--resume")
    assert code == 0, error
    assert model_files(interrupted.directory) == model_files(interrupted.whole)


def test_finished_run_stays_as_it_is(killed, rlhf):
    run = killed("sft")
    before = model_files(run.whole)
    code, error = rlhf(*run.command, "--output_dir", run.whole, "--resume")
    assert code == 0, error
    assert model_files(run.whole) == before


def test_resume_without_a_run_starts_one(killed, rlhf, tmp_path):
    run = killed("sft")
    code, error = rlhf(*run.command, "--output_dir", tmp_path / "new", "--resume")
    assert code == 0, error
    assert model_files(tmp_path / "new") == model_files(run.whole)


@pytest.mark.parametrize("name", ["prompts", "policy"])
def test_inputs_that_have_changed_are_noticed(name, ppo_config, base, data, tmp_path, monkeypatch):
    """Another policy would be another reference, to which the KL is."""
    policy = shutil.copytree(base, tmp_path / "policy")
    prompts = shutil.copy(data.prompts, tmp_path / "prompts.jsonl")
    config = ppo_config(policy=str(policy), prompts=[str(prompts)], checkpoint_every=2)
    stop_at_step_3(ppo, config, monkeypatch)
    changed = {"prompts": prompts, "policy": policy / "model.safetensors"}[name]
    before = changed.read_bytes()
    changed.write_bytes(before[:-4] + bytes([before[-4] ^ 1]) + before[-3:])  # a letter, or a bit of a weight
    shown = {"prompts": prompts, "policy": policy}[name]
    with pytest.raises(RunError, match=rf"{name}: {shown} has changed since the run began"):
        ppo.train(config, resume=True)
    changed.write_bytes(before)
    assert ppo.train(config, resume=True).exists()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_run_called_from_python_stops_and_goes_on(stage, sft_config, reward_config, ppo_config, data, monkeypatch):
    """The same in this process: a run is not started twice, goes on to the same weights, and is not trained again."""
    config, module = {"sft": (sft_config, sft), "reward": (reward_config, reward), "ppo": (ppo_config, ppo)}[stage]
    options = {"checkpoint_every": 2} | ({"ema_decay": 0.5, "gamma_ptx": 1.0} if stage == "ppo" else {"epochs": 2})
    whole, stopped = config("whole", **options), config("stopped", **options)
    directory = module.train(whole).parent
    stop_at_step_3(module, stopped, monkeypatch)
    with pytest.raises(RunError, match="holds a run already"):
        module.train(stopped)
    path = module.train(stopped, resume=True)
    assert model_files(path.parent) == model_files(directory)
    assert metrics(path.parent) == metrics(directory)
    assert yaml.safe_load((path.parent / "config.yaml").read_text())["stage"] == stage

    monkeypatch.setattr(module, "optimizer_step", None)
    assert module.train(stopped, resume=True) == path == path.parent / "model"
