"""Measures every op of rlhf_kernels against the plain formula, torch.compile of it, and other libraries.

    python benchmarks/run.py            # everything, on a GPU where there is one
    python benchmarks/run.py --family log_prob --dtype bfloat16 --json results.json
    python benchmarks/run.py --quick    # small sizes, float32, under a minute: shows that it works, not how fast
    python benchmarks/run.py --json results.json --resume    # goes on where a run with --json was stopped
    python benchmarks/run.py --family step --trl ../trl/bin/python    # whole iterations of the trainer, on a CPU
    python benchmarks/run.py --family drop_in    # TRL, verl and OpenRLHF with our ops in them and without, on a CPU

All implementations of a case run in turns, so that a machine that slows down slows all of them. A peer that isn't
installed costs one line. Ctrl-C prints, and writes, what was measured so far.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import bounds
import drop_in
import machine
import plot
import report
import step as trainer_steps
import torch
from console import Console
from measure import FULL, QUICK, Group, Measurement, Task, measure

import rlhf_kernels
from rlhf_kernels import ops

FAMILIES: dict[str, ModuleType] = {family: importlib.import_module(family) for family in ops.FAMILIES}
# Of whole trainers, on a CPU: ours, and other people's with our ops in them and without.
TRAINERS = ("step", "drop_in")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def writable(text: str) -> Path:
    """A path that can be written to, checked before anything is measured. Its directory is made."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: is a directory, or in one that can't be written")
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default here: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable; default: those of each family")
    parser.add_argument(
        "--family", choices=(*FAMILIES, *TRAINERS), action="append", help="repeatable; default: those of the ops"
    )
    parser.add_argument("--trl", metavar="PYTHON", help="for step: a Python that has TRL 1.9.2")
    parser.add_argument("--quick", action="store_true", help="small sizes, few runs: shows that it works, not how fast")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--resume", action="store_true", help="go on with the run that left --json its file")
    parser.add_argument("--plot", type=writable, metavar="FILE", help="draw a figure; needs matplotlib")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    for name in set(options.family or ()) & set(TRAINERS):
        if options.device != "cpu":
            parser.error(f"--family {name}: is measured on a CPU alone")
    if options.resume and not options.json:
        parser.error("--resume: needs --json")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib (pip install matplotlib)")
    return options


def plan(options: argparse.Namespace) -> Iterator[tuple[str, Measurement]]:
    """The title of every group, and what measures it, in order."""
    scale, full = "quick" if options.quick else options.device, FULL[options.device]
    for name in options.family or FAMILIES:
        if name == "step":
            yield from trainer_steps.plan(scale, options.trl)
            continue
        if name == "drop_in":
            yield from drop_in.plan(scale, full if not options.quick else QUICK)
            continue
        family = FAMILIES[name]
        dtypes = [DTYPES[dtype] for dtype in options.dtype or ()] or family.DTYPES[options.device]
        for i, case in enumerate(family.cases(scale)):
            # Compiling takes most of the time of a quick run, and one case shows as well as all of them that it works.
            effort = full if not options.quick else QUICK if i == 0 else replace(QUICK, modes=())
            for dtype in dtypes if options.dtype or not options.quick else dtypes[:1]:
                for step in case.steps:
                    task = Task(name, case, dtype, step, effort)
                    yield str(task), partial(measure, task)


def main(argv: list[str] | None = None) -> int:
    """Runs what the options ask for; returns the exit status."""
    options = parse(argv)
    device = torch.device(options.device)
    console, groups, status = Console(), list[Group](), 0
    about = machine.describe(device)
    if options.resume and options.json.exists():
        try:
            groups, console.notes[:], rates = report.read_json(options.json, about, device)
        except ValueError as error:
            print(f"run.py: error: --resume {options.json}: {error}", file=sys.stderr)
            return 2
    else:
        console.begin("bandwidth")
        rates = bounds.measure_rates(device)
    there = set(map(str, groups))
    planned = [(title, measurement) for title, measurement in plan(options) if title not in there]

    def save(*, complete: bool) -> None:
        if options.json:
            report.write_json(options.json, report.as_dict(groups, console.notes, about, rates, complete))

    try:
        for i, (title, measurement) in enumerate(planned, 1):
            console.begin(f"[{i}/{len(planned)}] {title}")
            try:
                measurement(rates, groups.append, console)
            except Exception as error:
                console.note(f"{console.title}: {type(error).__name__}: {error}")
                status = 1
            save(complete=False)
    except KeyboardInterrupt:
        console.note("interrupted: what follows is what was measured until then")
        status = 130
    save(complete=status == 0)
    console.clear()
    print(_heading(about, rates), report.table(groups), sep="\n\n", flush=True)
    if options.plot:
        plot.draw(groups, f"{about['gpu'] or about['cpu']}, torch {about['torch']}", options.plot)
    return status


def _heading(about: dict[str, object], rates: bounds.Rates) -> str:
    where = about["gpu"] or f"{about['cpu']}, {about['threads']} threads"
    matmul = "".join(f", {name} matmul {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.matmul.items())
    return (
        f"{where}, torch {about['torch']}, rlhf_kernels {about['rlhf_kernels']} ({about['commit']}), "
        f"backends {', '.join(rlhf_kernels.available_backends())}\n"
        f"reads {rates.read / 1e9:.1f} GB/s ({rates.read_with}), "
        f"reads and writes {rates.copy / 1e9:.1f} GB/s ({rates.copy_with}){matmul}"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peers' deprecations and compilers' hints are not for the reader of a benchmark
    sys.exit(main())
