"""How an op reaches its kernel, and what torch must know of it besides: fake kernels and derivatives.

The families register theirs through these decorators. Where this install has no native ops, torch has no schemas
either, and eager code runs the Triton kernels without them.
"""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlhf_kernels.backends import emulated, has
from rlhf_kernels.ops import OPS

Backward = Callable[..., Mapping[str, Tensor | None]]

_FAKES: dict[str, Callable[..., Any]] = {}


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers shapes and dtypes of an op's results, for compilers and ``meta`` tensors."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _FAKES[name] = function
        if has("cpu"):
            torch.library.register_fake(f"rlhf_kernels::{name}", function)
        return function

    return register


def register_triton() -> None:
    """Makes Triton's kernels torch's for GPUs where there are none in CUDA C++: compiled code finds them so.

    Eager code goes to them directly. Called once, after the families have been imported.
    """
    if not has("cpu"):
        return
    for op, facts in OPS.items():
        for name in (op, *facts.derivative):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"rlhf_kernels::{name}", "CUDA"):
                torch.library.impl(f"rlhf_kernels::{name}", "cuda", functools.partial(_run_triton, name))


def _run_triton(name: str, *inputs: Any) -> Any:
    return implementation("triton", name)(*inputs)


class _Derivative(NamedTuple):
    function: type[torch.autograd.Function]
    variables: tuple[int, ...]
    """Where among the op's arguments those are that it has a gradient for."""


_DERIVATIVES: dict[str, _Derivative] = {}


def autograd(name: str, save: Callable[..., None], variables: tuple[str, ...]) -> Callable[[Backward], Backward]:
    """Registers the derivative of an op in the arguments that are named, after its fake kernel, which names them all.

    ``save(ctx, inputs, output)`` keeps what the derivative needs, the variables among the saved tensors; ``inputs`` has
    the op's arguments by name. ``backward(ctx, saved, *gradients)`` returns the gradients of the variables by name.
    Differentiating twice raises.
    """
    names = tuple(inspect.signature(_FAKES[name]).parameters)
    Inputs = namedtuple("Inputs", names)  # type: ignore[misc]

    def register(backward: Backward) -> Backward:
        def once(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            if not torch.is_grad_enabled():
                return tuple(map(backward(ctx, saved, *gradients).get, names))
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            inputs = [x for x in (*saved, *gradients) if isinstance(x, Tensor) and x.requires_grad]
            tied = {at: None if x is None else _NoSecondDerivative.apply(x, name, *inputs) for at, x in results.items()}
            return tuple(map(tied.get, names))

        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, ctx.backend = arguments
            output = run_kernel(ctx.backend, name, *inputs)
            save(ctx, Inputs(*inputs), output)
            return output

        def traced(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.backend = None
            save(ctx, Inputs(*inputs), output)

        def eager(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return *once(ctx, *gradients), None

        if has("cpu"):
            torch.library.register_autograd(f"rlhf_kernels::{name}", once, setup_context=traced)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(eager)}
        _DERIVATIVES[name] = _Derivative(
            type(name, (torch.autograd.Function,), methods), tuple(map(names.index, variables))
        )
        return backward

    return register


@functools.cache
def implementation(backend: str, name: str) -> Callable[..., Any]:
    """The function that a backend has for an op: torch's, where the backend registers its kernels with torch."""
    if backend == "triton":
        from rlhf_kernels import triton

        return triton.OPS[name]
    library = torch.ops.rlhf_kernels_emulated if backend == "cuda" and emulated("cuda") else torch.ops.rlhf_kernels
    return getattr(library, name).default


def run_kernel(backend: str | None, name: str, *inputs: Any) -> Any:
    """The op ``name`` without its derivative. No backend: the one that torch has for the tensors' device."""
    if backend is None:
        return getattr(torch.ops.rlhf_kernels, name)(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return implementation(backend, name)(*inputs)


def call(backend: str, name: str, *inputs: Any) -> Any:
    """The op ``name`` on a backend other than the reference, with its derivative, if any, where one will be asked for.

    A compiler sees the registered op. Eager code goes round torch.library's own wrapper, which takes longer than the
    small ops themselves, to the same derivative.
    """
    derivative = _DERIVATIVES.get(name)
    if derivative is not None and not needs_gradient(*[inputs[at] for at in derivative.variables]):
        derivative = None  # whatever else requires a gradient: results don't, then
    if torch.compiler.is_compiling() and has("cpu"):
        if derivative is not None:
            return run_kernel(None, name, *inputs)
        with torch.no_grad():
            return run_kernel(None, name, *inputs)
    if forward_ad._current_level >= 0:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(
                f"{name} has no forward-mode derivative on this backend; use_backend('reference') has one for most ops"
            )
    if derivative is not None:
        return derivative.function.apply(*inputs, backend)
    return run_kernel(backend, name, *inputs)


class _NoSecondDerivative(torch.autograd.Function):
    """A first derivative, tied to what it depends on, so that a second one is an error rather than a silent 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.name} has no second derivative on this backend; use_backend('reference') has one for most ops"
        )


def needs_gradient(*inputs: Any) -> bool:
    """Whether a derivative in one of these, those that are tensors, will be asked for."""
    if torch.is_grad_enabled():
        for x in inputs:  # a generator would take longer than what it looks at
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def scaled(gradient: Tensor, by: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The saved gradient of a scalar loss, times the gradient that came in.

    Multiplying by 1 costs as much as reading twice what is multiplied, gigabytes for some ops. Where looking at the
    value would wait for a GPU or break a graph (a compiler's tensors have types of their own), it is done. None stands
    for 0, and stays.
    """
    if by is None:
        return None
    if type(by) is Tensor and by.is_cpu and not torch.compiler.is_compiling() and by.item() == 1:
        return gradient if gradient.dtype == dtype else gradient.to(dtype)
    return (gradient * by).to(dtype)
