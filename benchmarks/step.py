"""Whole iterations of the trainer: PPO, against TRL's, and training of the reward model.

Each trainer runs in a process of its own (``step_worker.py``), so that its peak of memory is its own. The bound is the
multiplications of an iteration, attention left out, at the rate of a library matmul that is measured in the same run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bounds
import torch
from bounds import Work
from cases import OURS
from console import Console
from measure import Group, Measurement, Row, title

WORKER = Path(__file__).with_name("step_worker.py")

SMALL_BODY = {"width": 256, "layers": 4, "vocabulary": 50_257, "prompt": 32, "response": 64, "batch": 32}
LARGE_BODY = {"width": 512, "layers": 6, "vocabulary": 32_000, "prompt": 64, "response": 64, "batch": 16}
RANKED = LARGE_BODY | {"prompt": 256, "batch": 4, "completions": 9}
TINY = {"width": 64, "layers": 2, "vocabulary": 1000, "prompt": 16, "response": 8, "batch": 8}
SHAPES: dict[str, dict[str, list[dict[str, int]]]] = {
    "cpu": {"ppo": [SMALL_BODY, LARGE_BODY], "reward": [RANKED]},
    "quick": {"ppo": [TINY], "reward": [TINY | {"completions": 4}]},
}
STEPS = {"cpu": 3, "quick": 2}
MINIBATCHES = 4


def plan(scale: str, trl: str | None) -> Iterator[tuple[str, Measurement]]:
    """The title of every shape, and what measures it. ``trl`` is a Python that has TRL 1.9.2, if there is one."""
    for stage, shapes in SHAPES[scale].items():
        for sizes in shapes:
            shape = sizes | {"steps": STEPS[scale], "minibatches": MINIBATCHES}
            name = title(f"{stage} iteration", described(shape), "float32", "iteration")
            yield name, partial(measure, stage, shape, trl)


def measure(
    stage: str,
    shape: dict[str, int],
    trl: str | None,
    rates: bounds.Rates,
    started: Callable[[Group], None],
    console: Console,
) -> None:
    """Measures iterations of one shape."""
    tokens = shape["batch"] * (shape["prompt"] + shape["response"] * shape.get("completions", 1))
    flops = ppo_flops(shape) if stage == "ppo" else reward_flops(shape)
    bound = rates.seconds(Work(0, flops=flops), torch.float32)
    group = Group("step", f"{stage} iteration", described(shape), "float32", "iteration", bound)
    started(group)
    peers = [(OURS, sys.executable, "rlhf")]
    if stage == "ppo" and trl:
        peers.append(("TRL 1.9.2", trl, "trl"))
    elif stage == "ppo":
        console.note("TRL's PPO is left out: --trl names a Python that has TRL 1.9.2")
    for name, python, trainer in peers:
        console.say(name)
        found = run(python, trainer, stage, shape)
        row = Row(name, times_s=found["seconds"], peak_extra_bytes=found["peak_bytes"])
        group.rows.append(row)
        console.note(f"{console.title}, {name}: {tokens / statistics.median(row.times_s):.0f} tokens a second")


def described(shape: dict[str, int]) -> str:
    """A shape in a line."""
    text = "{width}x{layers} V={vocabulary} prompt={prompt} response={response} batch={batch}".format(**shape)
    return text + (f" K={shape['completions']}" if "completions" in shape else "")


def run(python: str, trainer: str, stage: str, shape: dict[str, int]) -> dict[str, Any]:
    """What the worker prints.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    command = [python, str(WORKER), trainer, stage, json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{trainer} {stage}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def body_flops(shape: dict[str, int], tokens: int) -> int:
    """The multiplications and additions of all blocks for so many tokens, forward."""
    return 2 * 12 * shape["width"] ** 2 * shape["layers"] * tokens


def ppo_flops(shape: dict[str, int]) -> int:
    """Of a rollout, a pass of reference, value and reward model each, and a training step of policy and value model."""
    tokens, predicted = shape["batch"] * (shape["prompt"] + shape["response"]), shape["batch"] * shape["response"]
    body, head = body_flops(shape, tokens), 2 * shape["width"] * shape["vocabulary"] * predicted
    return (body + head) + (3 * body + head) + 3 * (body + head) + 3 * body


def reward_flops(shape: dict[str, int]) -> int:
    """Of a training step with every prompt once."""
    return 3 * body_flops(shape, shape["batch"] * (shape["prompt"] + shape["completions"] * shape["response"]))
