"""How a call reaches its kernel, and what torch must also know of an op: its fake kernel and its derivative.

The families register these with the decorators here. The schemas come with the native ops. In an install
without those nothing is registered with torch here, and eager code calls the Triton kernels directly.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlhf_kernels.backends import emulated, has
from rlhf_kernels.ops import OPS

Backward = Callable[..., Mapping[str, Tensor | None]]

# Looked up once: each of these would take as long as a check of an argument.
_transforms = torch._C._functorch.peek_interpreter_stack
_below_autograd = torch._C._AutoDispatchBelowAutograd

_FAKES: dict[str, Callable[..., Any]] = {}


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function that gives the shapes and dtypes of an op's results, for compilers and ``meta`` tensors."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _FAKES[name] = function
        if has("cpu"):
            torch.library.register_fake(f"rlhf_kernels::{name}", function)
        return function

    return register


def register_triton() -> None:
    """Registers the Triton kernels with torch, for the ops that have no kernel in CUDA C++.

    Compiled code finds them through torch; eager code calls them directly. Called once, after the families have been
    imported.
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
    """The positions of the arguments that the op is differentiable in."""

    def is_needed(self, inputs: tuple[Any, ...]) -> bool:
        """Whether a gradient in one of the variables will be asked for."""
        if torch.is_grad_enabled():
            for at in self.variables:
                if inputs[at] is not None and inputs[at].requires_grad:
                    return True
        return False


_DERIVATIVES: dict[str, _Derivative] = {}


def autograd(name: str, save: Callable[..., None], variables: tuple[str, ...]) -> Callable[[Backward], Backward]:
    """Registers the derivative of an op in the arguments that ``variables`` names.

    The fake kernel must be registered first, since the names of all arguments are read from it.
    ``save(ctx, inputs, output)`` saves the tensors that the derivative needs, the variables among them; ``inputs`` has
    the op's arguments by name. ``backward(ctx, saved, *gradients)`` returns the gradients of the variables by name.
    Differentiating twice raises.
    """
    names = tuple(inspect.signature(_FAKES[name]).parameters)
    Inputs = namedtuple("Inputs", names)  # type: ignore[misc]

    def register(backward: Backward) -> Backward:
        def once(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            return differentiated_once(name, map(results.get, names), (*saved, *gradients))

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


def autograd_of_loss(name: str, variable: str) -> None:
    """Registers the derivative of a loss that is computed with its gradient.

    The op returns the loss, one tensor that has no derivative, and the gradient of the argument ``variable``.
    """

    def save(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        _, statistics, gradient = output
        ctx.save_for_backward(getattr(inputs, variable), gradient)
        ctx.mark_non_differentiable(statistics, gradient)
        # Otherwise autograd would make zeros as the gradient of ``gradient``, which is as large.
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor, *_: Any) -> dict[str, Tensor | None]:
        operand, gradient = saved
        return {variable: scaled(gradient, grad_loss, operand.dtype)}

    autograd(name, save, (variable,))(backward)


@functools.cache
def implementation(backend: str, name: str) -> Callable[..., Any]:
    """A backend's function for an op. For the native backends that is the op which they registered with torch."""
    if backend == "triton":
        from rlhf_kernels import triton

        return triton.OPS[name]
    library = torch.ops.rlhf_kernels_emulated if backend == "cuda" and emulated("cuda") else torch.ops.rlhf_kernels
    return getattr(library, name).default


def run_kernel(backend: str | None, name: str, *inputs: Any) -> Any:
    """Runs an op without its derivative on a backend. With None torch chooses the kernel, by the tensors' device."""
    if backend is None:
        return getattr(torch.ops.rlhf_kernels, name)(*inputs)
    with _below_autograd():
        return implementation(backend, name)(*inputs)


def call(backend: str, name: str, *inputs: Any) -> Any:
    """Runs the op ``name`` on a backend other than the reference, with its derivative if one will be asked for.

    A compiler sees the registered op. Eager code uses an autograd function with the same derivative instead: the
    wrapper of torch.library takes longer than the small ops themselves.
    """
    derivative = _DERIVATIVES.get(name)
    if derivative is not None and not derivative.is_needed(inputs):
        derivative = None  # then no result requires a gradient, even if some other input does
    if torch.compiler.is_compiling() and has("cpu"):
        if forward_ad._current_level >= 0:
            raise RuntimeError(no_forward_mode(name))
        # Not without a cause: what torch.func transforms requires no gradient that can be seen here.
        unused = derivative is None and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        with torch.no_grad() if unused else contextlib.nullcontext():
            return run_kernel(None, name, *inputs)
    if forward_ad._current_level >= 0:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(no_forward_mode(name))
    if _transforms() is not None:
        raise RuntimeError(
            f"{name} takes whole batches, and none of torch.func's transforms (vmap, grad) on this backend: give it a "
            "leading dimension, and differentiate with torch.autograd"
        )
    if derivative is not None:
        return derivative.function.apply(*inputs, backend)
    return run_kernel(backend, name, *inputs)


def no_forward_mode(name: str) -> str:
    """What a forward-mode derivative is told."""
    return f"{name} has no forward-mode derivative on this backend; use_backend('reference') has one for most ops"


class _NoSecondDerivative(torch.autograd.Function):
    """Ties a first derivative to the tensors it depends on, so that a second one is an error and not a silent 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.name} has no second derivative on this backend; use_backend('reference') has one for most ops"
        )


def differentiated_once(name: str, results: Iterable[Tensor | None], used: Iterable[Any]) -> tuple[Tensor | None, ...]:
    """First derivatives as a backward returns them, tied to the tensors it used where a second one may be asked for."""
    if not torch.is_grad_enabled():
        return tuple(results)
    inputs = [x for x in used if isinstance(x, Tensor) and x.requires_grad]
    return tuple(None if x is None else _NoSecondDerivative.apply(x, name, *inputs) for x in results)


def needs_gradient(*inputs: Tensor | None) -> bool:
    """Whether a gradient of one of these tensors will be asked for; None has none."""
    if torch.is_grad_enabled():
        for x in inputs:  # a loop: any() with a generator takes longer
            if x is not None and x.requires_grad:
                return True
    return False


def _is_one(number: Tensor) -> bool:
    try:
        return number.item() == 1
    except RuntimeError:  # of several gradients at once, as vmap has them
        return False


def scaled(gradient: Tensor, by: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The saved gradient of a scalar loss, times the gradient that came in.

    The saved gradient is gigabytes for some ops, and multiplying it by 1 would read and write all of it. That is left
    out where ``by`` is a plain tensor on the CPU. Elsewhere, looking at its value would wait for a GPU or break a
    compiler's graph (whose tensors have types of their own). None means 0, and gives None.
    """
    if by is None:
        return None
    if type(by) is Tensor and by.is_cpu and not torch.compiler.is_compiling() and _is_one(by):
        return gradient if gradient.dtype == dtype else gradient.to(dtype)
    return (gradient * by).to(dtype)
