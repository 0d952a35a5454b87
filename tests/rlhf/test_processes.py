"""Two processes are one run: they share each batch, even a last batch with only one record."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tools import metrics, only_line

CODE = """
import sys
import torch
torch.set_num_threads(1)
from rlhf.__main__ import main
sys.exit(main())
"""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def together(*arguments, processes=2):
    """Starts the command as torchrun would, and returns each process's status and errors."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, *map(str, arguments)],
            env=environment | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(processes)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        return [(error, process.returncode) for process in started for error in [process.communicate(timeout=120)[1]]]
    finally:
        for process in started:
            process.kill()


def weights(directory):
    return load_file(Path(directory) / "model/model.safetensors")


@pytest.mark.long_for(stage=["sft"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_last_batch_of_one_record(stage, rlhf, base, data, tmp_path):
    """Five records in batches of two: the process without a share of the last one must not keep the other waiting."""
    records = Path({"sft": data.demonstrations, "reward": data.comparisons}[stage])
    few = tmp_path / "few.jsonl"
    few.write_text("".join(records.read_text().splitlines(keepends=True)[:5]))
    options = [stage, "--model", base, "--data", few, "--epochs", 1, "--batch_size", 2, "--device", "cpu"]
    options += ["--residual_dropout", 0] if stage == "sft" else []
    for error, status in together(*options, "--output_dir", tmp_path / "two"):
        assert status == 0, error
    assert rlhf(*options, "--output_dir", tmp_path / "one")[0] == 0
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    ours, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-4)


@pytest.mark.long
def test_a_minibatch_that_processes_cannot_share(base, reward_model, data, tmp_path):
    found = together(
        "ppo", "--policy", base, "--reward_model", reward_model, "--prompts", data.prompts, "--device", "cpu",
        "--episodes", 9, "--batch_size", 9, "--minibatch_size", 3, "--output_dir", tmp_path / "run",
        "--lengths.max_response_tokens", 4,
    )  # fmt: skip
    for error, status in found:
        assert status == 2
        assert only_line(error) == "rlhf ppo: error: minibatch_size: is 3, must be a multiple of the 2 processes"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["generate", "evaluate"])
def test_processes_without_a_part_are_refused(stage, rlhf, base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = ["--prompts", data.prompts, "--output_dir", tmp_path / "out"]
    status, error = rlhf(stage, "--model", base, *(["--baseline", base] if stage == "evaluate" else []), *out)
    assert status == 2
    assert only_line(error) == f"rlhf {stage}: error: the launcher started 2 processes, of which 1 can take part"
    assert not (tmp_path / "out").exists()


def test_two_processes_sample_what_one_does(rlhf, base, reward_model, data, tmp_path):
    """An episode is drawn with its number in the run, whichever process draws it. No device is named."""
    options = ["ppo", "--policy", base, "--reward_model", reward_model, "--prompts", data.prompts]
    options += ["--episodes", 16, "--batch_size", 16, "--minibatch_size", 8, "--lengths.max_response_tokens", 8]
    for error, status in together(*options, "--output_dir", tmp_path / "two"):
        assert status == 0, error
    assert rlhf(*options, "--output_dir", tmp_path / "one")[0] == 0
    (two,), (one,) = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert two["response_tokens"] == one["response_tokens"]
    assert two["ended"] == one["ended"]
    assert two["reward"] == pytest.approx(one["reward"], rel=1e-4)
