"""What the trainer's tests share besides fixtures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from transformers import GPT2Config, GPT2LMHeadModel

from rlhf import cli

WORDS = [f"w{number:02d}" for number in range(54)]
CONTEXT = 64


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def model_files(directory):
    return {name: (directory / "model" / name).read_bytes() for name in ("model.safetensors", "config.json")}


def tiny_gpt2(vocabulary, eos, **options):
    settings = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1} | options
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=eos, eos_token_id=eos, **settings))


def run_here(*arguments):
    """Runs the command in this process, and returns its status."""
    try:
        return cli.main(list(map(str, arguments)))
    except SystemExit as end:
        return end.code


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
