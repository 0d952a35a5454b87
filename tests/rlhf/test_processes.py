"""Two processes are one run: they share each batch, even a last batch with only one record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools import metrics, only_line, start, together, weights


@pytest.mark.long_for(stage=["sft"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_last_batch_of_one_record(stage, rlhf, base, data, tmp_path):
    """Five records in batches of two: the process without a share of the last one must not keep the other waiting."""
    records = Path({"sft": data.demonstrations, "reward": data.comparisons}[stage])
    few = tmp_path / "few.jsonl"
    few.write_text("".join(records.read_text().splitlines(keepends=True)[:5]))
    options = [stage, "--model", base, "--data", few, "--epochs", 1, "--batch_size", 2, "--device", "cpu"]
    options += ["--residual_dropout", 0] if stage == "sft" else []
    for error, status, _ in together(*options, "--output_dir", tmp_path / "two"):
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
    for error, status, _ in found:
        assert status == 2
        assert only_line(error) == "rlhf ppo: error: minibatch_size: is 3, must be a multiple of the 2 processes"
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_be_joined(base, data, tmp_path, monkeypatch):
    """A launcher that says how many there are, but not where they meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    process = start("generate", "--model", base, "--prompts", data.prompts, "--output_dir", tmp_path / "out")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert only_line(error).startswith("rlhf generate: error: the processes that were started can't be joined: ")
    assert "MASTER_ADDR" in error
    assert not (tmp_path / "out").exists()


ENDS_FIRST = """
import atexit, ctypes, os, time
if os.environ["RANK"] == "0":
    atexit.register(ctypes.PyDLL(None).sleep, 6)  # the last thing before Python is taken down, and with the GIL held
import accelerate, torch
import torch.distributed as dist
from rlhf import __main__ as command

accelerate.Accelerator(cpu=True).wait_for_everyone()
shares, own = [torch.ones(1), torch.ones(1)], torch.ones(1)
if os.environ["RANK"] == "0":
    dist.all_gather(shares, own, async_op=True)
    command.main = lambda: 1
    command.start()
time.sleep(3)
try:
    dist.all_gather(shares, own)
except RuntimeError:
    pass  # the other process has ended
os._exit(0)
"""


def test_ends_while_a_collective_is_under_way():
    """Gloo's thread, which lets go of its tensors last, may wait for the GIL when Python is taken down."""
    assert [status for _, status, _ in together(code=ENDS_FIRST)] == [1, 0]


def test_two_processes_sample_what_one_does(rlhf, base, reward_model, data, tmp_path):
    """An episode is drawn with its number in the run, whichever process draws it. No device is named."""
    options = ["ppo", "--policy", base, "--reward_model", reward_model, "--prompts", data.prompts]
    options += ["--episodes", 16, "--batch_size", 16, "--minibatch_size", 8, "--lengths.max_response_tokens", 8]
    for error, status, _ in together(*options, "--output_dir", tmp_path / "two"):
        assert status == 0, error
    assert rlhf(*options, "--output_dir", tmp_path / "one")[0] == 0
    (two,), (one,) = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert two["response_tokens"] == one["response_tokens"]
    assert two["ended"] == one["ended"]
    assert two["reward"] == pytest.approx(one["reward"], rel=1e-4)
