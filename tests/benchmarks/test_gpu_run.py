"""The run on a GPU: each of its steps works on a CPU, has a limit, and leaves the others alone."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_run.py"


@pytest.fixture
def gpu_run(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("gpu_run")


def arguments_of(process):
    """Nothing where there is no such process, or where it has ended and nobody has asked for its status."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.long
def test_every_step_on_a_cpu(tmp_path):
    done = run("--dry", "--out", tmp_path)
    assert done.returncode == 0, done.stdout
    outcomes = json.loads((tmp_path / "run.json").read_text())
    assert [each["status"] for each in outcomes] == ["ok"] * 6
    for each in outcomes:
        assert f"at most {each['limit']} s" in (tmp_path / each["log"]).read_text()
        assert each["step"] in done.stdout.splitlines()[-6:][outcomes.index(each)]
    assert json.loads((tmp_path / "cpu.json").read_text())["complete"]
    assert "rlhf_kernels::linear_ppo_policy_loss" in (tmp_path / "profile_gpt2.txt").read_text()


def test_the_steps_on_a_gpu_fit_ten_minutes_and_need_no_index(gpu_run, tmp_path):
    (tmp_path / "some-1.0-py3-none-any.whl").touch()
    planned = list(gpu_run.steps(tmp_path, str(tmp_path)))
    assert sum(step.limit for step in planned) + 4 * gpu_run.LAST_WORDS <= 600  # few of them run out of time
    assert [step.name for step in planned[:3]] == ["build", "tests", "benchmarks"]
    assert f"--no-index --find-links {tmp_path} some\n" in planned[0].command[-1]
    assert len({path for step in planned for path in (f"{step.name}.log",)}) == len(planned)


def test_a_step_that_fails_or_hangs_is_said_and_ends(gpu_run, tmp_path):
    hangs = """
import signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # so its child does, too
child = subprocess.Popen(["sleep", "600"])
signal.signal(signal.SIGINT, lambda *_: print("last words of", child.pid, flush=True))
while True: time.sleep(1)
"""
    step = gpu_run.Step("hangs", 3, [sys.executable, "-c", hangs])
    assert gpu_run.run(step, tmp_path).status == "out of time"
    said = (tmp_path / "hangs.log").read_text().splitlines()[-1]
    assert said.startswith("last words of")
    started = int(said.split()[-1])
    for _ in range(100):  # it has been killed, and may yet be going
        if "sleep" not in arguments_of(started):
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the step has started goes on")
    fails = [sys.executable, "-c", "import sys; sys.exit('no such luck')"]
    assert gpu_run.run(gpu_run.Step("fails", 20, fails), tmp_path).status == "failed"
    assert "no such luck" in (tmp_path / "fails.log").read_text()
    assert gpu_run.run(gpu_run.Step("absent", 20, ["no-such-tool"]), tmp_path).status == "failed"


def test_a_step_alone(tmp_path):
    done = run("--dry", "--only", "build", "--out", tmp_path)
    assert done.returncode == 0, done.stdout
    assert [each["step"] for each in json.loads((tmp_path / "run.json").read_text())] == ["build"]
    done = run("--dry", "--only", "bild", "--out", tmp_path)
    assert done.returncode == 2
    assert "--only bild: the steps are build, tests, " in done.stderr
