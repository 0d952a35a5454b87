"""What the trainer's tests share besides fixtures."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf import cli, training

WORDS = [f"w{number:02d}" for number in range(54)]
CONTEXT = 64


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def model_files(directory):
    return {name: (directory / "model" / name).read_bytes() for name in ("model.safetensors", "config.json")}


def written(config):
    """The completions that an evaluation wrote."""
    with open(f"{config.output_dir}/completions.jsonl") as file:
        return [json.loads(line) for line in file]


def longer(prompt, a, b):
    """A judge that prefers the longer answer."""
    assert prompt
    return 0.5 if len(a) == len(b) else float(len(a) > len(b))


def tiny_gpt2(vocabulary, eos, **options):
    settings = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1} | options
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=eos, eos_token_id=eos, **settings))


def run_here(*arguments):
    """Runs the command in this process, and returns its status."""
    try:
        return cli.main(list(map(str, arguments)))
    except SystemExit as end:
        return end.code


def stop_at_step_3(module, config, monkeypatch):
    """Trains, and is interrupted in the fourth step."""

    def stop(run, *arguments):
        if run.step == 3:
            raise KeyboardInterrupt
        return training.optimizer_step(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "optimizer_step", stop)
        with pytest.raises(KeyboardInterrupt):
            module.train(config)


def start(*arguments, **options):
    """Starts the command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "rlhf", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def only_line(error):
    """The only line of an error. Checks that there is just one; warnings of libraries before it do not count."""
    lines = [line for line in error.splitlines() if line.startswith(("rlhf ", "rlhf:")) or "Traceback" in line]
    assert len(lines) == 1, error
    assert re.match(r"rlhf( \w+)?: error: ", lines[0])
    assert error.rstrip().splitlines()[-1] == lines[0], error
    return lines[0]


CODE = """
import json, os, sys
import torch
torch.set_num_threads(1)
from rlhf import sharding, training
from rlhf import __main__ as command

held = []
def place(model, *arguments, _place=sharding.place):
    whole = sum(parameter.numel() for parameter in model.parameters())
    model = _place(model, *arguments)
    held.append(sum(sharding.local(parameter).numel() for parameter in model.parameters()) / whole)
    return model

sharding.place = training.place = place  # evaluate, which is imported later, has this one as well
if os.environ.get("NO_ROOM"):
    sharding.fits = lambda model: False
if stop := os.environ.get("STOP_AFTER"):
    def steps(run, *arguments, _steps=training.Run.steps, **options):
        for step in _steps(run, *arguments, **options):
            if step == int(stop):
                sys.stdout.flush()
                run.accelerator.wait_for_everyone()
                os._exit(0)
            yield step
    training.Run.steps = steps
def main(_main=command.main):
    status = _main()
    if status == 0:
        print(json.dumps(held))
    return status
command.main = main
command.start()
"""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def begin_together(*arguments, processes=2, code=CODE, **environment):
    """Starts the command, or another program, as torchrun would."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    } | environment  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(processes)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def together(*arguments, **options):
    """Runs the command as torchrun would, and returns of each process its errors, status and what it printed last: the
    shares of the models' weights that it held, as JSON."""
    started = begin_together(*arguments, **options)
    try:
        ended = [(*process.communicate(timeout=120), process.returncode) for process in started]
        return [(error, status, ([*out.splitlines(), "[]"][-2:-1] or ["[]"])[0]) for out, error, status in ended]
    finally:
        for process in started:
            process.kill()


def weights(directory):
    return load_file(Path(directory) / "model/model.safetensors")
