"""What torch must know of the native ops besides their kernels: fake kernels and derivatives.

The families register theirs through these decorators, which do nothing where this install has no native ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backends import missing
from rlhf_kernels.checks import values_can_be_read

Backward = Callable[..., tuple[Tensor | None, ...]]


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers shapes and dtypes of an op's results, for compilers and ``meta`` tensors."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if missing("cpu") is None:
            torch.library.register_fake(f"rlhf_kernels::{name}", function)
        return function

    return register


def autograd(name: str, save: Callable[..., None]) -> Callable[[Backward], Backward]:
    """Registers the derivative of an op.

    ``save(ctx, inputs, output)`` keeps what the derivative needs, the inputs that it is taken in among the saved
    tensors; ``backward(ctx, saved, *gradients)`` returns one gradient per input. Differentiating twice raises.
    """

    def register(backward: Backward) -> Backward:
        def once(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            if not torch.is_grad_enabled():
                return results
            inputs = [x for x in (*saved, *gradients) if isinstance(x, Tensor) and x.requires_grad]
            return tuple(None if x is None else _NoSecondDerivative.apply(x, name, *inputs) for x in results)

        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = getattr(torch.ops.rlhf_kernels, name)(*inputs)
            save(ctx, inputs, output)
            return output

        if missing("cpu") is None:
            torch.library.register_autograd(f"rlhf_kernels::{name}", once, setup_context=save)
        _FUNCTIONS[name] = type(
            name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(once)}
        )
        return backward

    return register


_FUNCTIONS: dict[str, Any] = {}


def call(name: str, *inputs: Any) -> Any:
    """The native op ``name``, with its derivative where one will be asked for.

    A compiler sees the registered op. Eager code goes round torch.library's own wrapper, which takes longer than the
    small ops themselves, to the same derivative.
    """
    op = getattr(torch.ops.rlhf_kernels, name)
    if torch.compiler.is_compiling() or name not in _FUNCTIONS:
        return op(*inputs)
    if not needs_gradient(*(x for x in inputs if isinstance(x, Tensor))):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)
    return _FUNCTIONS[name].apply(*inputs)


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


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a derivative in one of these will be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def scaled(gradient: Tensor, by: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The saved gradient of a scalar loss, times the gradient that came in.

    Multiplying by 1 costs as much as reading twice what is multiplied, gigabytes for some ops. Where the value can't be
    looked at (a compiler's tensors are of types of their own), it is done. None stands for 0, and stays.
    """
    if by is None:
        return None
    if type(by) is Tensor and values_can_be_read(by) and by.item() == 1:
        return gradient.to(dtype)
    return (gradient * by).to(dtype)
