"""Argument checks that every family shares. Messages name the argument, what it was, and what fits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int64, torch.int32)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """A tensor of one of ``dtypes``, on the device of ``like``.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: is {type(value).__name__}, must be a tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: has dtype {value.dtype}, must be one of {', '.join(str(d) for d in dtypes)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, must be on {like.device} like the other tensors")


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """A tensor of exactly one shape; ``meaning`` says where it comes from.

    Raises:
        ValueError: another shape.
    """
    if value.shape != expected:
        raise ValueError(f"{name}: has shape {tuple(value.shape)}, must be {tuple(expected)}, {meaning}")


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, exclusive_low: bool = False
) -> None:
    """A finite number in a range.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: is {type(value).__name__}, must be a number")
    too_low = value <= low if exclusive_low else value < low
    if too_low or value > high or not -math.inf < value < math.inf:  # compiled code knows no math.isfinite of a symbol
        first, last = "(" if exclusive_low else "[", ")" if high == math.inf else "]"
        raise ValueError(f"{name}: is {value}, must be finite and in {first}{low}, {high}{last}")


def integer(name: str, value: Any) -> None:
    """An int, which a bool is not.

    Raises:
        TypeError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: is {value!r} of type {type(value).__name__}, must be an int")


def boolean(name: str, value: Any) -> None:
    """True or False.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: is {value!r} of type {type(value).__name__}, must be True or False")


def choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    """One of some words.

    Raises:
        ValueError: another value.
    """
    if value not in options:
        raise ValueError(f"{name}: is {value!r}, must be one of {', '.join(map(repr, options))}")


def values_can_be_read(value: Tensor) -> bool:
    """Whether looking at a tensor's values costs no synchronisation and breaks no graph."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def mask(name: str, value: Tensor | None, like: Tensor, expected: tuple[int, ...]) -> Tensor:
    """A mask as bool: which positions count. None means all of them.

    Raises:
        TypeError: not a tensor of bool, integers or floats.
        ValueError: another shape or device, or (looked at on the CPU only) a value besides 0 and 1.
    """
    if value is None:
        return torch.ones(expected, dtype=torch.bool, device=like.device)
    tensor(name, value, MASKS, like)
    shape(name, value, expected, "one entry per position")
    if value.dtype == torch.bool:
        return value
    if values_can_be_read(value):
        bad = (value != 0) & (value != 1)
        if bad.any():
            position = tuple(bad.nonzero()[0].tolist())
            raise ValueError(f"{name}: is {value[position].item()} at position {position}, must be 0 or 1")
    return value != 0


def index_range(name: str, index: Tensor, size: int, wanted: Tensor) -> None:
    """Every wanted index is in [0, size). Looked at on the CPU only; a GPU kernel gives NaN for a bad one.

    Raises:
        IndexError: names the first bad index and its position.
    """
    if not values_can_be_read(index):
        return
    bad = wanted & ((index < 0) | (index >= size))
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(f"{name}: is {int(index[position])} at position {position}, must be in [0, {size})")


def boundaries(name: str, value: Any, length: int, like: Tensor) -> None:
    """Where packed sequences begin and end: (B+1,) from 0 up to ``length``.

    Raises:
        TypeError: not a tensor of int32 or int64.
        ValueError: another shape, or (looked at on the CPU only) boundaries out of order.
    """
    tensor(name, value, INDICES, like)
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{name}: has shape {tuple(value.shape)}, must be (sequences + 1,)")
    if values_can_be_read(value):
        if int(value[0]) != 0 or int(value[-1]) != length:
            raise ValueError(f"{name}: goes from {int(value[0])} to {int(value[-1])}, must go from 0 to {length}")
        if (value.diff() < 0).any():
            raise ValueError(f"{name}: decreases, must not")
