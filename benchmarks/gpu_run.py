"""All that is to be learned from a GPU, in one run of ten minutes: build, tests, benchmarks, iterations, sanitizers.

    make gpu-run                            # on a machine with a GPU and nvcc; results in gpu_run/
    make gpu-run DRY=1                      # every step on a CPU, at toy sizes: shows that the run itself works
    make gpu-run WHEELS=wheels/extra        # what the machine lacks comes from a folder, not from an index; made by
                                            # pip download '.[test,bench]' with that machine's Python and torch
    make gpu-run ARGS='--only benchmarks'   # a step alone, or several

A step has a limit of its own, and writes its log as it goes. One that fails or takes too long doesn't stop the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commit import commit

ROOT = Path(__file__).parent.parent
LAST_WORDS = 3
"""Seconds that a step has to end by itself once its time is over."""
MODELS = Path(tempfile.gettempdir()) / "rlhf_gpu_run"
"""Where iterations share models with random weights: gigabytes, that nobody wants among the results."""
SHOWN = 15
"""Lines of a failed step's log that are shown again at the end."""


@dataclass(frozen=True)
class Step:
    """A command of the run."""

    name: str
    limit: int
    """In seconds, on a GPU."""
    command: list[str]
    environment: dict[str, str] | None = None


@dataclass
class Outcome:
    """What came of a step."""

    step: str
    status: str
    """ok, failed, or out of time."""
    seconds: float
    limit: int
    log: str


def python(*words: str | Path) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *map(str, words)]


def shell(*commands: list[str]) -> list[str]:
    """Commands one after another, until one fails."""
    return ["bash", "-ec", "\n".join(map(shlex.join, commands))]


def installing(wheels: str | None) -> list[list[str]]:
    """What is in a folder of wheels and not here, and this project, built here."""
    install = python("-m", "pip", "install", "--quiet", "--no-deps")
    editable = [*install, "--no-build-isolation", "--editable", str(ROOT)]
    if wheels is None:
        return [editable]
    names = sorted({wheel.name.partition("-")[0] for wheel in Path(wheels).glob("*.whl")})
    return [[*install, "--no-index", "--find-links", wheels, *names], editable]


def iteration(out: Path, name: str, shape: dict[str, Any]) -> list[str]:
    """PPO iterations under torch's profiler, whose table is kept."""
    return python(ROOT / "benchmarks/step_worker.py", "rlhf", "ppo", json.dumps(shape | {"profile": str(out / name)}))


def steps(out: Path, wheels: str | None) -> Iterator[Step]:
    """The run on a GPU, the most valuable first."""
    needed = {
        "RLHF_KERNELS_REQUIRE": "cpu,cuda", "TORCH_CUDA_ARCH_LIST": "9.0a",
        "PIP_BREAK_SYSTEM_PACKAGES": "1",  # the machine is there for this alone
    }  # fmt: skip
    all_there = python("-c", "import rlhf.cli, hypothesis, matplotlib, xdist")
    yield Step("build", 80, shell(*installing(wheels), python("-m", "rlhf_kernels"), all_there), needed)
    # Compiling for GPUs that are not here needs none.
    chosen = ("-k", "(triton or cuda or gpu) and not compiles_and_spills", "-m", "not install and not long")
    yield Step("tests", 90, python("-m", "pytest", "-q", "-n", "8", ROOT / "tests/kernels", *chosen))
    # No run of another commit goes on with this file.
    results = ("--json", out / f"cuda_{commit() or 'unknown'}.json", "--resume", "--plot", out / "cuda.png")
    yield Step("benchmarks", 150, python(ROOT / "benchmarks/run.py", "--device", "cuda", *results))
    gpt2 = {"width": 768, "layers": 12, "vocabulary": 50_257, "prompt": 256, "response": 256, "batch": 64}
    llama = {"type": "llama", "width": 2048, "layers": 16, "vocabulary": 128_256, "prompt": 512, "response": 256}
    common = {"device": "cuda", "steps": 1, "minibatches": 4}
    for name, shape, attention, limit in (
        ("gpt2", gpt2, "sdpa", 35),
        ("llama", llama | {"batch": 32}, "sdpa", 60),  # the first makes the models
        ("llama_varlen", llama | {"batch": 32}, "varlen_attn", 50),
        ("llama_flex", llama | {"batch": 32}, "flex_attention", 55),
    ):
        settings = {"mixed_precision": "bf16", "frozen_dtype": "bfloat16", "attention": attention}
        shape |= common | {"settings": settings, "models": str(MODELS / shape.get("type", "gpt2"))}
        yield Step(f"iteration_{name}", limit, iteration(out, f"profile_{name}.txt", shape))
    small = python("-m", "pytest", "-q", "-x", ROOT / "tests/kernels/test_determinism.py")
    for tool in ("memcheck", "racecheck"):
        checked = ["compute-sanitizer", "--error-exitcode", "1", "--tool", tool, *small]
        yield Step(tool, 30, [*checked, "-k", "(triton or cuda) and runs"])


def dry_steps(out: Path) -> Iterator[Step]:
    """The same on a CPU: Triton's interpreter, the emulation of CUDA, toy models, and no sanitizer.

    SDPA stands for flex_attention, which has no backward pass on a CPU, and for varlen_attn, which needs a GPU.
    """
    yield Step("build", 80, python("-m", "rlhf_kernels"))
    chosen = ("-k", "triton or cuda", "-m", "not install and not long")
    yield Step("tests", 90, python("-m", "pytest", "-q", "-n", "2", ROOT / "tests/kernels/test_kl_reward.py", *chosen))
    results = ("--json", out / "cpu.json", "--plot", out / "cpu.png")
    options = ("--quick", "--device", "cpu", "--family", "kl_reward")
    yield Step("benchmarks", 150, python(ROOT / "benchmarks/run.py", *options, *results))
    tiny = {"width": 64, "layers": 2, "vocabulary": 500, "prompt": 16, "response": 8, "batch": 8, "steps": 1}
    for kind in ("gpt2", "llama"):
        shape = tiny | {"type": kind, "minibatches": 2, "settings": {"mixed_precision": "bf16", "attention": "sdpa"}}
        yield Step(f"iteration_{kind}", 50, iteration(out, f"profile_{kind}.txt", shape))
    small = python("-m", "pytest", "-q", "-x", ROOT / "tests/kernels/test_determinism.py")
    yield Step("memcheck", 35, [*small, "-k", "triton and runs and kl_penalty"])


def run(step: Step, out: Path) -> Outcome:
    """Runs a step with its limit. Everything that it has started ends with it."""
    log = out / f"{step.name}.log"
    began = time.monotonic()
    with log.open("w") as written:
        written.write(f"{' '.join(step.command)}\nat most {step.limit} s\n\n")
        written.flush()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (step.environment or {})
        try:
            process = subprocess.Popen(
                step.command, stdout=written, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except OSError as error:
            written.write(f"{error}\n")
            return Outcome(step.name, "failed", 0.0, step.limit, log.name)
        try:
            status = "ok" if process.wait(timeout=step.limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C, upon which the benchmarks print what they have
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=LAST_WORDS)
        finally:
            stop(process)
    return Outcome(step.name, status, round(time.monotonic() - began, 1), step.limit, log.name)


def stop(process: subprocess.Popen[Any]) -> None:
    """Ends a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    """Runs the steps, and prints a table last. Returns 1 if one of them is not ok."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--only", action="append", metavar="STEP", help="repeatable; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu_run"), help="where logs and results go: %(default)s")
    parser.add_argument("--wheels", metavar="DIR", help="wheels of what this machine lacks")
    options = parser.parse_args()
    if options.wheels and not list(Path(options.wheels).glob("*.whl")):
        parser.error(f"--wheels {options.wheels}: holds no wheel")
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    planned = list(dry_steps(out) if options.dry else steps(out, options.wheels))
    if unknown := set(options.only or ()) - {step.name for step in planned}:
        parser.error(f"--only {unknown.pop()}: the steps are {', '.join(step.name for step in planned)}")
    outcomes = []
    for step in planned:
        if options.only and step.name not in options.only:
            continue
        print(f"{step.name}: at most {step.limit} s", flush=True)
        outcomes.append(run(step, out))
        (out / "run.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=2) + "\n")
    for each in outcomes:
        if each.status != "ok":
            print(f"\n{each.log}:", *(out / each.log).read_text(errors="replace").splitlines()[-SHOWN:], sep="\n")
    print()
    for each in outcomes:
        print(f"{each.step:<18} {each.status:<12} {each.seconds:7.1f} s of {each.limit:4d}   {each.log}")
    return int(any(each.status != "ok" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
