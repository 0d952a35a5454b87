"""Argument checks that every family shares. Messages name the argument, what it was, and what fits."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int64, torch.int32)
MASKS = (torch.bool, torch.float32, torch.int64, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8,
         torch.int8, torch.int16)  # fmt: skip


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None, hint: str = "") -> None:
    """Checks that a value is a tensor of one of ``dtypes``, on the device of ``like``. ``hint`` ends a dtype's error.

    Raises:
        TypeError: not a tensor, a DTensor, or another dtype.
        ValueError: another device.
    """
    kind = type(value)
    if kind is Tensor and value.dtype in dtypes and (like is None or value.device == like.device):
        return  # the usual case, in half the time
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: is {kind.__name__}, must be a tensor")
    if kind.__name__ == "DTensor":  # by name: importing its module takes a second
        raise TypeError(
            f"{name}: is a DTensor, of which this process holds a part; pass {name}.full_tensor(), or under FSDP call "
            "the op inside the forward of the module that owns it, where it is whole"
        )
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: has dtype {value.dtype}, must be one of {', '.join(str(d) for d in dtypes)}{hint}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, must be on {like.device} like the other tensors")


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Checks a tensor's shape; ``meaning`` tells the reader of the error where that shape comes from.

    Raises:
        ValueError: another shape.
    """
    if value.shape != expected:
        raise ValueError(f"{name}: has shape {tuple(value.shape)}, must be {tuple(expected)}, {meaning}")


def logits(value: Any) -> None:
    """Checks (..., V) logits.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: no dimension, or nothing in the last one.
    """
    tensor("logits", value, FLOATS)
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"logits: has shape {tuple(value.shape)}, must be (..., V) with V at least 1")


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, exclusive_low: bool = False
) -> float:
    """The number that a value is, checked to be finite and in a range.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    if type(value) is float and low < value < high:
        return value
    value = _plain(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: is {type(value).__name__}, must be a number")
    too_low = value <= low if exclusive_low else value < low
    if too_low or value > high or not -math.inf < value < math.inf:  # math.isfinite does not take symbolic numbers
        first, last = "(" if exclusive_low else "[", ")" if high == math.inf else "]"
        raise ValueError(f"{name}: is {value}, must be finite and in {first}{low}, {high}{last}")
    return value


def temperature(value: Any, *, zero: bool = False) -> float:
    """The temperature that a value is: positive, or with ``zero`` not negative, and such that 1/τ is a float32.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    value = number("temperature", value, 0.0, exclusive_low=not zero)
    return value if value == 0 else number("temperature", value, 1e-37, 1e37)


def ignore_index(value: Any, index: Tensor) -> int:
    """The int that a value is, checked to be one of the index's dtype: another would be taken for one that is.

    Raises:
        TypeError: no int.
        ValueError: too large.
    """
    value = integer("ignore_index", value)
    limits = torch.iinfo(index.dtype)
    if not limits.min <= value <= limits.max:
        raise ValueError(f"ignore_index: is {value}, must be in [{limits.min}, {limits.max}], as {index.dtype} is")
    return value


def integer(name: str, value: Any) -> int:
    """The int that a value is; a bool does not pass for one.

    Raises:
        TypeError: something else.
    """
    value = _plain(name, value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: is {value!r} of type {type(value).__name__}, must be an int")
    return value


def int64(name: str, value: Any) -> int:
    """The int that a value is, checked to fit an int64.

    Raises:
        TypeError: something else.
        ValueError: too large.
    """
    value = integer(name, value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: is {value}, must be in [-2**63, 2**63)")
    return value


def _plain(name: str, value: Any) -> Any:
    """Python's number for one of NumPy or for a 0-d tensor on the CPU, as configurations and schedules have them."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_cpu and value.dtype != torch.bool:
        if value.requires_grad:
            raise TypeError(f"{name}: requires a gradient, and there is none in it; pass {name}.item()")
        return value.item()
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def boolean(name: str, value: Any) -> None:
    """Checks that a value is True or False.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: is {value!r} of type {type(value).__name__}, must be True or False")


def choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Checks that a value is one of ``options``.

    Raises:
        ValueError: another value.
    """
    if value not in options:
        raise ValueError(f"{name}: is {value!r}, must be one of {', '.join(map(repr, options))}")


def mask(name: str, value: Tensor | None, like: Tensor, expected: tuple[int, ...]) -> None:
    """Checks a mask of the positions that count, except its values (:func:`read_mask`). With None they all do.

    Raises:
        TypeError: not a tensor of bool, integers or floats.
        ValueError: another shape or device.
    """
    if value is not None:
        tensor(name, value, MASKS, like)
        if value.shape != expected:
            shape(name, value, expected, "one entry per position")


def boundaries(name: str, value: Any, like: Tensor) -> None:
    """Checks the (B+1,) boundaries of packed sequences, except their values (:func:`read_boundaries`).

    Raises:
        TypeError: not a tensor of int32 or int64.
        ValueError: another shape or device.
    """
    tensor(name, value, INDICES, like)
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{name}: has shape {tuple(value.shape)}, must be (sequences + 1,)")


# The functions below look at a tensor's values, and return it as the backend takes it. The native CPU ops check values
# themselves, with the same errors (csrc/checks.h). Values on a GPU are not checked, since that would wait for the GPU.


def read_mask(backend: str, name: str, value: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask as a backend takes it: kernels as it is, of any dtype or None; the reference bool, of ``like``'s shape.

    The CPU ops check its values themselves.

    Raises:
        ValueError: on the CPU, a value besides 0 and 1; names the first one and its position.
    """
    if value is None:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device) if backend == "reference" else None
    if backend == "cpu" or value.dtype == torch.bool:
        return value
    value = value.detach()
    if value.is_cpu:
        value = _check_mask(value, name)
    return value != 0 if backend == "reference" else value


def to_be_kept(mask: Tensor | None) -> Tensor | None:
    """The mask as a backward may keep it: torch allows that of no tensor that inference mode has made."""
    if mask is None or torch.compiler.is_compiling() or not mask.is_inference() or torch.is_inference_mode_enabled():
        return mask
    return mask.clone()


def read_index(
    backend: str, name: str, value: Tensor, mask: Tensor | None, size: int, ignore_index: int | None = None
) -> Tensor:
    """The index, checked to be in [0, size) where it counts: where the mask says so and it is not ``ignore_index``.

    On a GPU it is not checked; its kernels give NaN.

    Raises:
        IndexError: on the CPU, names the first bad index and its position.
    """
    if backend == "cpu" or not value.is_cpu:
        return value
    return _check_index(value, counted(value, mask, ignore_index), size, name)


def counted(index: Tensor, mask: Tensor | None, ignore_index: int | None) -> Tensor:
    """Bool: the rows that count. For what is not a kernel; those find out row by row, without a launch of its own."""
    if ignore_index is None:
        return torch.ones_like(index, dtype=torch.bool) if mask is None else mask != 0
    wanted = index != ignore_index
    return wanted if mask is None else wanted & (mask != 0)


def read_boundaries(backend: str, name: str, value: Tensor | None, length: int) -> Tensor | None:
    """The boundaries, checked to rise from 0 to ``length``.

    Raises:
        ValueError: on the CPU, other ends, or boundaries that decrease.
    """
    if value is None or backend == "cpu" or not value.is_cpu:
        return value
    return _check_boundaries(value, length, name)


def read_drawn(backend: str, tokens: Tensor) -> Tensor:
    """Tokens that ``sample_tokens`` drew, checked not to be −1, which a row without a distribution gives.

    Raises:
        ValueError: on the CPU, names the first such row.
    """
    return tokens if backend == "cpu" or not tokens.is_cpu else _check_drawn(tokens)


def _in_graphs(schema: str) -> Callable[[Callable[..., None]], Callable[..., Tensor]]:
    """Makes a check of a tensor's values return that tensor, and run in compiled code too.

    A compiler sees the check as an op that returns a copy of the tensor, and the code goes on with that copy: an op
    whose result nothing uses is left out.
    """

    def make(check: Callable[..., None]) -> Callable[..., Tensor]:
        def copy(value: Tensor, *others: Any) -> Tensor:
            check(value, *others)
            return value.clone()

        name = f"rlhf_kernels::{check.__name__.lstrip('_')}"
        op = torch.library.custom_op(name, copy, mutates_args=(), schema=schema)
        op.register_fake(lambda value, *_: torch.empty_like(value))

        @functools.wraps(check)
        def checked(value: Tensor, *others: Any) -> Tensor:
            if torch.compiler.is_compiling():
                return op(value, *others)
            check(value, *others)
            return value

        return checked

    return make


@_in_graphs("(Tensor value, str name) -> Tensor")
def _check_mask(value: Tensor, name: str) -> None:
    bad = (value != 0) & (value != 1)
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name}: is {value[position].item()} at position {position}, must be 0 or 1")


@_in_graphs("(Tensor value, Tensor wanted, SymInt size, str name) -> Tensor")
def _check_index(value: Tensor, wanted: Tensor, size: int, name: str) -> None:
    bad = wanted & ((value < 0) | (value >= size))
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(f"{name}: is {value[position].item()} at position {position}, must be in [0, {size})")


@_in_graphs("(Tensor value, SymInt length, str name) -> Tensor")
def _check_boundaries(value: Tensor, length: int, name: str) -> None:
    if value[0] != 0 or value[-1] != length:
        raise ValueError(f"{name}: goes from {value[0]} to {value[-1]}, must go from 0 to {length}")
    if (value.diff() < 0).any():
        raise ValueError(f"{name}: decreases, must not")


@_in_graphs("(Tensor tokens) -> Tensor")
def _check_drawn(tokens: Tensor) -> None:
    bad = tokens == -1
    if bad.any():
        row = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"logits: row {row} holds NaN or inf, or nothing above -inf, so that no token can be drawn")
