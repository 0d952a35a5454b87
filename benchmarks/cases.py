"""What a family file declares: a case, and the implementations that are compared on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from bounds import Work
from torch import Tensor

from rlhf_kernels import use_backend
from rlhf_kernels.backends import has
from rlhf_kernels.ops import OPS

Inputs = dict[str, Tensor]

FORWARD = "forward"
BACKWARD = "forward+backward"
OURS = "rlhf_kernels"
MODES = ("default", "max-autotune")


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case. Its imports happen in ``load``, so that a peer that is missing costs one line."""

    name: str
    load: Callable[[], Callable[..., Any]]
    takes: tuple[str, ...] = ()
    """Names of the inputs it is called with, in order; empty: those of the case."""
    overwrites: str | None = None
    """An input that it destroys. A new copy is made before each run, outside the timed region."""
    compiles: tuple[str, ...] = ()
    """The modes of torch.compile in which it is measured too."""
    install: str = ""
    """What pip calls its package."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    steps: tuple[str, ...] = (FORWARD, BACKWARD)
    compared: bool = True
    """Whether its values are meant to be those of the case, so that an error can be given."""
    adapt: Callable[[list[Tensor], Inputs], list[Tensor]] | None = None
    """Brings its outputs to the definition of the case, before errors are taken; never timed."""
    on_gpu: tuple[str, ...] = ()
    """The GPU backends that have it. It runs on the first that is installed; the others are measured beside it."""


@dataclass(frozen=True)
class Case:
    """An op at a size. ``truth`` is the op of rlhf_kernels; errors are taken against its float64 reference."""

    op: str
    size: str
    inputs: Callable[[torch.Generator, torch.dtype], Inputs]
    takes: tuple[str, ...]
    truth: Callable[..., Any]
    implementations: tuple[Implementation, ...]
    work: Callable[[Inputs, str], Work]
    gradients: tuple[str, ...] = ()
    """Inputs that are differentiated."""
    steps: tuple[str, ...] = (FORWARD,)
    rows: tuple[str, ...] = ()
    """Inputs whose first dimension is independent rows. A chunk takes some rows of these, and all of other inputs."""
    chunk: int | None = None
    """How many rows at a time the truth is computed for, where all of them would need gigabytes."""
    sample: int | None = None
    """How many rows errors are taken over, where the rest would tell nothing new."""
    share: Callable[[Inputs, Inputs], float] | None = None
    """For scalar outputs that are means over rows: the weight of a chunk in the mean over all rows."""
    adversarial: Callable[[Inputs], Inputs] | None = None
    """The same shapes with values that break careless formulas."""
    remark: str = ""
    """What a reader should know of this case."""
    valid: Callable[[Inputs], Tensor] | None = None
    """Where outputs are compared; None: everywhere."""

    def candidates(self, step: str, modes: tuple[str, ...]) -> Iterator[Implementation]:
        """The implementations to measure, with torch.compile of the plain formulas in each mode."""
        for implementation in self.implementations:
            if step not in implementation.steps:
                continue
            yield implementation
            yield from (forced(implementation, backend) for backend in installed(implementation.on_gpu)[1:])
            yield from (compiled(implementation, mode) for mode in implementation.compiles if mode in modes)


def compiled(plain: Implementation, mode: str) -> Implementation:
    """torch.compile of a formula for one shape, as in a training loop that pads to one length."""
    name = plain.name.replace("eager", "torch.compile") + (f" {mode}" if mode != "default" else "")
    return replace(plain, name=name, compiles=(), load=lambda: torch.compile(plain.load(), mode=mode, dynamic=False))


def installed(on_gpu: tuple[str, ...]) -> list[str]:
    """The backends among these that this install has; none if there is no GPU."""
    return [name for name in on_gpu if has(name)] if torch.cuda.is_available() else []


def forced(implementation: Implementation, backend: str) -> Implementation:
    """The op on this backend, whichever it would choose by itself."""

    def load() -> Callable[..., Any]:
        op = implementation.load()

        def call(*inputs: Any) -> Any:
            with use_backend(backend):
                return op(*inputs)

        return call

    return replace(implementation, name=f"{implementation.name} {backend}", load=load, devices=("cuda",), on_gpu=())


def ours(op: Callable[..., Any], takes: tuple[str, ...] = ()) -> Implementation:
    """The op under test, on the backend that it chooses by itself."""
    called = getattr(op, "func", op).__name__  # op may be a partial of the function
    on_gpu = next(op.on_gpu for name, op in OPS.items() if called.startswith(name))
    return Implementation(OURS, lambda: op, takes, on_gpu=on_gpu)


def eager(
    formula: Callable[..., Any], takes: tuple[str, ...] = (), *, compiles: tuple[str, ...] = MODES, whose: str = ""
) -> Implementation:
    """The plain formula, as people write it. ``whose`` names the library whose steps it follows, if these differ."""
    return Implementation("eager" + (f", {whose} steps" if whose else ""), lambda: formula, takes, compiles=compiles)
