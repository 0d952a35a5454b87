"""The benchmark runs, reports every implementation with its error, and survives what users do to it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_kernels import ops

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"


def run(*arguments):
    return subprocess.run([sys.executable, RUN, *arguments], capture_output=True, text=True, check=False)


def test_a_quick_run_prints_a_table_and_writes_what_it_measured(tmp_path):
    done = run("--quick", "--device", "cpu", "--family", "kl_reward", "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    for word in ("kl_penalty", "rlhf_kernels", "eager", "torch.compile", "median", "of bound", "error"):
        assert word in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"]
    assert "rlhf_kernels" in json.dumps(results)


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on(tmp_path):
    file = tmp_path / "results.json"
    command = ("--quick", "--device", "cpu", "--family", "kl_reward", "--json", file, "--resume")
    assert run(*command).returncode == 0
    whole = json.loads(file.read_text())
    stopped = json.loads(file.read_text())
    stopped["groups"][-1]["rows"][-1]["peak_extra_bytes"] = None
    stopped["complete"] = False
    file.write_text(json.dumps(stopped))
    assert run(*command).returncode == 0
    again = json.loads(file.read_text())
    assert again["complete"]
    assert len(again["groups"]) == len(whole["groups"]) > 1
    assert again["groups"][:-1] == whole["groups"][:-1]
    assert again["groups"][-1] != whole["groups"][-1]

    file.write_text(json.dumps(stopped | {"machine": stopped["machine"] | {"commit": "0123"}}))
    done = run(*command)
    assert done.returncode == 2
    assert "results.json: commit was 0123 and is now" in done.stderr


def test_an_unknown_family_is_named():
    done = run("--family", "gpt")
    assert done.returncode == 2
    assert "gpt" in done.stderr


@pytest.mark.long_for(option=["--plot"])
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_can_not_be_written_is_named_before_anything_is_measured(tmp_path, option):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "results"):
        done = run("--quick", option, path)
        assert done.returncode == 2
        assert f"{option}: {path}: " in done.stderr


def test_the_time_of_a_call_beside_its_kernel_is_told_for_every_small_op(monkeypatch, capsys):
    monkeypatch.syspath_prepend(RUN.parent)
    python_time = importlib.import_module("python_time")
    monkeypatch.setattr(python_time, "CALLS", 1)
    monkeypatch.setattr(python_time, "ROUNDS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    python_time.main()
    told = capsys.readouterr().out
    assert all(name in told for name, op in ops.OPS.items() if "cuda" in op.on_gpu)
