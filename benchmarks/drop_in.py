"""Other people's trainers with our ops in them and without: steps of TRL's GRPO, and functions of verl and OpenRLHF.

TRL's trainer runs in a process of its own (``step_worker.py``), with what TRL's own generation and models cost on a
CPU; the bound is that of the multiplications, as for our trainer. The functions are called as their trainers call them,
masks in float32.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import bounds
import gae
import log_prob
import ppo_loss
import step
import torch
from bounds import Work
from cases import BACKWARD, FORWARD, OURS, Case, Implementation, Inputs
from console import Console
from measure import Effort, Group, Measurement, Row, Task, title
from measure import measure as measure_case
from without_gpu import stubbed

import rlhf_kernels

GRPO = {"width": 256, "layers": 4, "vocabulary": 50_257, "prompt": 64, "response": 64, "batch": 16, "group": 8}
TINY = step.TINY | {"group": 4}
SHAPES = {"cpu": GRPO, "quick": TINY}
# Sequences and response positions; rows and vocabulary.
SIZES = {"cpu": ((64, 1024), (512, 50_257)), "quick": ((16, 128), (32, 1000))}


class Function(NamedTuple):
    """A function of another library, as its trainer calls it."""

    library: str
    module: str
    name: str
    call: Callable[..., Any]
    """Given the function and its module, what is called with the inputs of the case."""
    takes: tuple[str, ...]
    truth: Callable[..., Any]

    def load(self, *, patched: bool) -> Callable[..., Any]:
        """The library's own function, or what our patch puts in its place."""
        with stubbed() if self.library == "openrlhf" else contextlib.nullcontext():
            module = importlib.import_module(self.module)
        owner, _, name = self.name.rpartition(".")
        place = getattr(module, owner) if owner else module
        if not patched:
            return self.call(getattr(place, name), module)
        with importlib.import_module(f"rlhf_kernels.integrations.{self.library}").patch():
            return self.call(getattr(place, name), module)


POLICY = ("logprobs", "old_logprobs", "advantages", "mask")
VALUE = ("values", "old_values", "returns", "mask")
VERL, OPENRLHF = "verl.trainer.ppo.core_algos", "openrlhf.models.loss"


def _verl_policy_loss(function: Callable[..., Any], _: Any) -> Callable[..., Any]:
    actor = ppo_loss.verl_config()
    return lambda new, old, advantages, mask: function(old, new, advantages, mask, config=actor)[0]


def _policy_loss(function: Callable[..., Any], module: Any) -> Callable[..., Any]:
    loss = module.PolicyLoss()
    return lambda *inputs: function(loss, *inputs)[0]


def _value_loss(function: Callable[..., Any], module: Any) -> Callable[..., Any]:
    return partial(function, module.ValueLoss(0.2, token_level_loss=True))


FUNCTIONS = (
    Function(
        "verl", VERL, "compute_gae_advantage_return",
        lambda f, _: lambda *inputs: f(*inputs, gae.GAMMA, gae.LAM), gae.TAKES,
        partial(rlhf_kernels.masked_gae, gamma=gae.GAMMA, lam=gae.LAM, whiten="unbiased"),
    ),
    Function(
        "verl", VERL, "compute_policy_loss_vanilla", _verl_policy_loss, POLICY,
        lambda *inputs: rlhf_kernels.ppo_policy_loss(*inputs, dual_clip=3.0, log_ratio_clamp=20.0)[0],
    ),
    Function(
        "verl", VERL, "compute_value_loss",
        lambda f, _: lambda values, old, returns, mask: f(values, returns, old, mask, 0.2)[0], VALUE,
        lambda *inputs: rlhf_kernels.ppo_value_loss(*inputs)[0],
    ),
    Function(
        "openrlhf", OPENRLHF, "PolicyLoss.forward", _policy_loss, POLICY,
        lambda *inputs: rlhf_kernels.ppo_policy_loss(*inputs, log_ratio_clamp=20.0)[0],
    ),
    Function(
        "openrlhf", OPENRLHF, "ValueLoss.forward", _value_loss, VALUE,
        lambda *inputs: rlhf_kernels.ppo_value_loss(*inputs)[0],
    ),
    Function(
        "verl", "verl.utils.torch_functional", "logprobs_from_logits", lambda f, _: f, ("logits", "index"),
        rlhf_kernels.selective_log_softmax,
    ),
    Function(
        "openrlhf", "openrlhf.models.utils", "log_probs_from_logits", lambda f, _: f, ("logits", "index"),
        rlhf_kernels.selective_log_softmax,
    ),
)  # fmt: skip


def cases(scale: str) -> Iterator[Case]:
    """Every function, at the size of its inputs."""
    (batch, length), (rows, vocabulary) = SIZES[scale]
    for function in FUNCTIONS:
        of_logits, of_rewards = "logits" in function.takes, "rewards" in function.takes
        yield Case(
            f"{function.library} {function.name}",
            f"N={rows} V={vocabulary}" if of_logits else f"B={batch} T={length}",
            partial(log_prob.inputs, rows, vocabulary) if of_logits else partial(_tokens, batch, length),
            function.takes,
            function.truth,
            tuple(candidates(function)),
            (log_prob if of_logits else gae if of_rewards else ppo_loss).work,
            gradients=() if of_rewards else function.takes[:1],
            steps=(FORWARD,) if of_rewards else (BACKWARD,),
            valid=(lambda inputs: inputs["mask"] != 0) if of_rewards else None,
        )  # fmt: skip


def candidates(function: Function) -> Iterator[Implementation]:
    """Ours in the function's place, and the library's own."""
    for name in (OURS, function.library):
        load = partial(function.load, patched=name == OURS)
        yield Implementation(name, load, install=function.library)


def _tokens(batch: int, length: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    inputs = ppo_loss.inputs(batch, length, generator, dtype)
    return inputs | {"rewards": inputs["advantages"]}


def plan(scale: str, effort: Effort) -> Iterator[tuple[str, Measurement]]:
    """The title of every group, and what measures it."""
    shape = SHAPES[scale] | {"steps": step.STEPS[scale]}
    yield title("TRL GRPO step", step.described(shape), "float32", "iteration"), partial(_grpo, shape)
    for case in cases(scale):
        task = Task("drop_in", case, torch.float32, case.steps[0], effort)
        yield str(task), partial(measure_case, task)


def _grpo(shape: dict[str, int], rates: bounds.Rates, started: Callable[[Group], None], console: Console) -> None:
    if importlib.util.find_spec("trl") is None:
        console.note("peer trl: not installed (pip install trl)")
        return
    group = Group(
        "drop_in", "TRL GRPO step", step.described(shape), "float32", "iteration",
        rates.seconds(Work(0, flops=grpo_flops(shape)), torch.float32),
    )  # fmt: skip
    started(group)
    for name, trainer in ((OURS, "trl patched"), ("trl", "trl")):
        console.say(name)
        found = step.run(sys.executable, trainer, "grpo", shape)
        group.rows.append(Row(name, times_s=found["seconds"], peak_extra_bytes=found["peak_bytes"]))


def grpo_flops(shape: dict[str, int]) -> int:
    """Of a rollout, a pass of the reference model, and a training step of the policy."""
    tokens, predicted = shape["batch"] * (shape["prompt"] + shape["response"]), shape["batch"] * shape["response"]
    body, head = step.body_flops(shape, tokens), 2 * shape["width"] * shape["vocabulary"] * predicted
    return 5 * (body + head)
