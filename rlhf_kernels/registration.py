"""What torch must know of the native ops besides their kernels: fake kernels and derivatives.

The families register theirs through these decorators, which do nothing where this install has no native ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backends import missing

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

        if missing("cpu") is None:
            torch.library.register_autograd(f"rlhf_kernels::{name}", once, setup_context=save)
        return backward

    return register


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


def scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """The saved gradient of a scalar loss, times the gradient that came in."""
    return (gradient * by).to(dtype)
