"""Runs the implementations of a case in turns, and measures times, memory and error."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import accuracy
import bounds
import clocks
import torch
from cases import BACKWARD, MODES, Case, Implementation, Inputs
from clocks import Clock
from console import Console
from memory import forget, peak_extra_bytes, return_free_memory
from torch import Tensor

Results = tuple[list[Tensor], list[Tensor]]
"""Outputs and gradients."""

SLOW_FIRST_CALL_S = 60.0

# On a CPU, inputs up to this size are small. With small inputs, each timed run follows an untimed run of the same
# implementation: otherwise the caches would hold what ran before, and a fast op would pay for loading its code after a
# slow one. With larger inputs, fresh pages cost more than cold caches, and each timed run starts from a trimmed heap:
# otherwise an implementation could reuse large chunks that the one before it has freed. On a GPU, the clock clears the
# caches, and torch keeps blocks of memory for whoever comes next.
SMALL_INPUTS = 32 << 20


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    fewest: int
    most: int
    modes: tuple[str, ...]
    """The modes of torch.compile to measure."""

    def rounds(self, one: float) -> int:
        """How often every implementation runs, if one round takes ``one`` seconds."""
        fewest = self.fewest if one < self.seconds else min(3, self.fewest)
        return max(fewest, min(self.most, int(self.seconds / max(one, 1e-9))))


FULL = {
    "cpu": Effort(seconds=10.0, fewest=5, most=200, modes=MODES),
    # A run on a GPU has minutes (gpu_run.py), of which compilers need most. max-autotune would search for all of them.
    "cuda": Effort(seconds=4.0, fewest=5, most=200, modes=MODES[:1]),
}
QUICK = Effort(seconds=0.2, fewest=3, most=20, modes=MODES[:1])
HOST_SHARE = 0.1
"""Of an effort's seconds, for the host times of one implementation."""


def title(op: str, size: str, dtype: str, step: str) -> str:
    """A group's name while it is measured, and by which a run that goes on knows it again."""
    return f"{op} {size} {dtype} {step}"


@dataclass(frozen=True)
class Task:
    """What to measure next."""

    family: str
    case: Case
    dtype: torch.dtype
    step: str
    effort: Effort

    @property
    def dtype_name(self) -> str:
        """The name of the dtype without ``torch.``."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return title(self.case.op, self.case.size, self.dtype_name, self.step)


@dataclass
class Row:
    """What was measured of one implementation."""

    implementation: str
    first_call_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    host_times_s: list[float] = field(default_factory=list)
    """How long calls keep their caller; empty on a CPU, where that is the time."""
    peak_extra_bytes: int | None = None
    gradient_bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def host_s(self) -> float:
        """The median of host times; 0 where there are none."""
        return statistics.median(self.host_times_s) if self.host_times_s else 0.0


@dataclass
class Group:
    """Rows that were measured in turns, on the same inputs."""

    family: str
    op: str
    size: str
    dtype: str
    step: str
    bound_s: float
    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        return title(self.op, self.size, self.dtype, self.step)


Measurement = Callable[[bounds.Rates, Callable[[Group], None], Console], None]
"""Measures a group. It hands the group over before anything is timed, so that an interrupt loses nothing."""


class Trial:
    """One implementation, ready to run on one set of inputs."""

    def __init__(self, implementation: Implementation, function: Callable[..., Any], case: Case, step: str):
        self.implementation = implementation
        self.function = function
        self.case = case
        self.takes = implementation.takes or case.takes
        self.differentiated = case.gradients if step == BACKWARD else ()
        self.cotangents: list[Tensor] = []

    def prepare(self, inputs: Inputs) -> Inputs:
        """Arguments for one run. An input that the run destroys is made anew: as in a model, by an op."""
        ready = {name: inputs[name].detach() for name in self.takes}
        for name in self.differentiated:
            ready[name].requires_grad_()
        spent = self.implementation.overwrites
        return ready | {spent: ready[spent] * 1} if spent else ready

    def ready(self, inputs: Inputs) -> Callable[[], Results]:
        """One run, with its arguments."""
        return partial(self.run, self.prepare(inputs))

    def run(self, ready: Inputs) -> Results:
        """Outputs and gradients. The only part that is timed."""
        with torch.set_grad_enabled(bool(self.differentiated)):
            outputs = accuracy.tensors(self.function(*(ready[name] for name in self.takes)))
        if not self.differentiated:
            return outputs, []
        sources = [(i, x) for i, x in enumerate(outputs) if x.requires_grad]
        for i in range(len(self.cotangents), len(outputs)):  # in the first run, which is not timed
            self.cotangents.append(accuracy.cotangent(i, outputs[i]))
        arriving = [self.cotangents[i] for i, _ in sources]
        variables = [ready[name] for name in self.differentiated]
        return outputs, list(torch.autograd.grad([x for _, x in sources], variables, arriving))

    def errors(self, inputs: Inputs, found: Results, expected: Results) -> dict[str, float]:
        """The largest absolute errors of what a run gave."""
        outputs, gradients = found
        if not self.implementation.compared:
            return {}
        if self.implementation.adapt:
            outputs = self.implementation.adapt(outputs, inputs)
        valid = self.case.valid(inputs) if self.case.valid else None
        errors = {"forward": accuracy.largest_error(outputs, expected[0], valid)}
        if gradients:
            errors["gradient"] = accuracy.largest_error(gradients, expected[1])
        return errors


def measure(task: Task, rates: bounds.Rates, started: Callable[[Group], None], console: Console) -> None:
    """Measures a group. ``started`` receives it before anything is timed, so that an interrupt loses nothing."""
    case, step, effort, device = task.case, task.step, task.effort, rates.device
    clock = clocks.of(device)
    torch.compiler.reset()  # frees the CUDA graphs of the case before
    forget(device)
    inputs = case.inputs(torch.Generator(device).manual_seed(0), task.dtype)
    bound = rates.seconds(case.work(inputs, step), task.dtype)
    group = Group(task.family, case.op, case.size, task.dtype_name, step, bound)
    started(group)
    if case.remark:
        console.note(case.remark)
    console.say("float64 truth")
    expected = accuracy.truth(case, inputs, with_gradients=step == BACKWARD)
    trials = []
    for implementation in case.candidates(step, effort.modes):
        console.say(f"{implementation.name}: first run")
        first = _first_run(implementation, case, step, inputs, expected, clock, device, console)
        if first:
            trials.append(first)
            group.rows.append(first[1])
    if case.adversarial:
        _adversarial(case, case.adversarial(inputs), step, trials, console)
    del expected
    forget(device)
    for trial, row in trials:
        console.say(f"{row.implementation}: host time")
        row.host_times_s = clock.host_seconds(partial(trial.ready, inputs), effort.seconds * HOST_SHARE)
    began = time.perf_counter()
    warm = [clock.seconds(trial.ready(inputs), row.host_s) for trial, row in trials]
    one_round = time.perf_counter() - began
    slow = sum(warm) > effort.seconds
    if slow:  # then the runs just made count as timed ones, and none is wasted
        for (_, row), seconds in zip(trials, warm, strict=True):
            row.times_s.append(seconds)
    rounds = effort.rounds(one_round) - slow
    small = sum(x.nbytes for x in inputs.values()) <= SMALL_INPUTS
    order = random.Random(0)
    for i in range(rounds):
        last = i == rounds - 1
        console.say(f"round {i + 1} of {rounds}")
        # The order changes every round, since each run finds the caches and the heap as the run before it left them.
        for trial, row in order.sample(trials, len(trials)):
            if slow and last:
                _measure_memory(trial, inputs, row, clock, device, timed=True)
                continue
            if small and device.type == "cpu":
                trial.run(trial.prepare(inputs))
            call = trial.ready(inputs)
            if not small and device.type == "cpu":
                return_free_memory()
            row.times_s.append(clock.seconds(call, row.host_s))
    if not slow:
        for trial, row in trials:
            console.say(f"{row.implementation}: memory")
            _measure_memory(trial, inputs, row, clock, device, timed=False)


def _measure_memory(trial: Trial, inputs: Inputs, row: Row, clock: Clock, device: torch.device, *, timed: bool) -> None:
    """Measures memory from a trimmed heap. That slows a fast run down, so only slow runs are timed here as well."""
    call = trial.ready(inputs)
    seconds: list[float] = []
    row.peak_extra_bytes = peak_extra_bytes(lambda: seconds.append(clock.seconds(call, row.host_s)), device)
    if timed:
        row.times_s += seconds


def _first_run(
    implementation: Implementation, case: Case, step: str, inputs: Inputs, expected: Results, clock: Clock,
    device: torch.device, console: Console,
) -> tuple[Trial, Row] | None:  # fmt: skip
    """Loads, compiles, runs and warms up an implementation. If it doesn't run here, prints why and returns None."""
    name = implementation.name
    if device.type not in implementation.devices:
        console.note(f"{name}: runs on {' and '.join(implementation.devices)} only")
        return None
    try:
        trial = Trial(implementation, implementation.load(), case, step)
        begin = time.perf_counter()
        results = trial.run(trial.prepare(inputs))
        clocks.synchronize(device)
        row = Row(name, first_call_s=time.perf_counter() - begin)
        row.gradient_bytes = 0 if implementation.overwrites else sum(x.nbytes for x in results[1])
        row.errors = trial.errors(inputs, results, expected)
        del results
        for _ in range(clock.warm_ups):
            trial.run(trial.prepare(inputs))
        clocks.synchronize(device)  # what fails late fails here
    except ModuleNotFoundError as error:
        package = implementation.install
        missing = "not installed" if package.replace("-", "_") == error.name else f"lacks {error.name}"
        console.note(f"peer {package}: {missing} (pip install {package})")
        return None
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        console.note(f"{name}: {case.op} {step} fails on {device.type}, {type(error).__name__}: {reason[:160]}")
        return None
    if row.first_call_s > SLOW_FIRST_CALL_S:
        console.note(f"{name}: the first call of {case.op} {case.size} took {row.first_call_s:.0f} s")
    return trial, row


def _adversarial(case: Case, inputs: Inputs, step: str, trials: list[tuple[Trial, Row]], console: Console) -> None:
    expected = accuracy.truth(case, inputs, with_gradients=step == BACKWARD)
    for trial, row in trials:
        console.say(f"{row.implementation}: adversarial inputs")
        errors = trial.errors(inputs, trial.run(trial.prepare(inputs)), expected)
        row.errors |= {f"adversarial {kind}": error for kind, error in errors.items()}
