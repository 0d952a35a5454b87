"""What the public functions ask of their arguments, and the words they refuse them with.

Shapes, dtypes, devices and options are checked always. Values are looked at only where that costs no wait for a
device: on CPU tensors, outside ``torch.compile``.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int64, torch.int32)
INTEGERS = (*INDICES, torch.int16, torch.int8, torch.uint8)


def _names(dtypes: Collection[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _tensor(name: str, value: object, dtypes: Collection[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; it must be a torch.Tensor of {_names(dtypes)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {_names([value.dtype])}; it must be one of {_names(dtypes)}")
    return value


def _like(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device, why: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {tuple(shape)}, {why}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device} with the other tensors")


def floating(name: str, value: object, min_dim: int = 0) -> Tensor:
    """A floating-point tensor with at least ``min_dim`` dimensions."""
    tensor = _tensor(name, value, FLOATS)
    if tensor.dim() < min_dim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have at least {min_dim} dimension(s)")
    return tensor


def floating_like(name: str, value: object, shape: tuple[int, ...], device: torch.device, why: str) -> Tensor:
    """A floating-point tensor of exactly this shape and device; ``why`` ends the sentence about the shape."""
    tensor = _tensor(name, value, FLOATS)
    _like(name, tensor, shape, device, why)
    return tensor


def index_like(name: str, value: object, shape: tuple[int, ...], device: torch.device, why: str) -> Tensor:
    """An int32 or int64 tensor of exactly this shape and device."""
    tensor = _tensor(name, value, INDICES)
    _like(name, tensor, shape, device, why)
    return tensor


def ranks_like(value: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The ranks of a ranking loss: any real numbers."""
    tensor = _tensor("ranks", value, (*INTEGERS, *FLOATS))
    _like("ranks", tensor, shape, device, "the shape of scores")
    return tensor


def mask_like(name: str, value: object, shape: tuple[int, ...], device: torch.device, why: str) -> Tensor | None:
    """A mask of this shape, as bool; None stays None."""
    if value is None:
        return None
    tensor = _tensor(name, value, (torch.bool, *INTEGERS, *FLOATS))
    _like(name, tensor, shape, device, why)
    if tensor.dtype == torch.bool:
        return tensor
    if values_readable(tensor):
        odd = (tensor != 0) & (tensor != 1)
        if odd.any():
            where = _first(odd)
            raise ValueError(f"{name} at position {where} is {tensor[where].item()}; a mask holds only 0 and 1")
    return tensor != 0


def offsets(name: str, value: object, total: int, device: torch.device) -> Tensor:
    """Cumulative offsets (S+1,) from 0 to ``total``."""
    tensor = _tensor(name, value, INDICES)
    if tensor.dim() != 1 or tensor.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be 1-D with one entry more than sequences")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device} with the other tensors")
    if values_readable(tensor):
        first, last = int(tensor[0]), int(tensor[-1])
        if first != 0 or last != total:
            raise ValueError(f"{name} runs from {first} to {last}; it must run from 0 to {total}, the tensors' length")
        falls = tensor[1:] < tensor[:-1]
        if falls.any():
            at = int(_first(falls)[0]) + 1
            raise ValueError(f"{name} falls from {int(tensor[at - 1])} to {int(tensor[at])} at position {at}")
    return tensor


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
) -> float:
    """A finite number in [low, high], or in (low, high] if ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {type(value).__name__}; it must be a number")
    fits = low < value <= high if above else low <= value <= high
    if not fits or not -math.inf < value < math.inf:
        span = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
        span += "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} is {value}; it must be a finite number{span}")
    return float(value)


def option(name: str, value: object, allowed: Collection[str]) -> str:
    """One of a few strings."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
    return str(value)


def boolean(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__}; it must be True or False")
    return value


def index_values(name: str, index: Tensor, kept: Tensor | None, size: int, but: str) -> None:
    """Raises IndexError for an index of a kept row outside [0, size), where values may be read."""
    if not values_readable(index):
        return
    bad = (index < 0) | (index >= size)
    if kept is not None:
        bad = bad & kept
    if bad.any():
        where = _first(bad)
        position = where[0] if len(where) == 1 else where
        raise IndexError(f"{name} at position {position} is {int(index[where])}; it must be in [0, {size}){but}")


def values_readable(tensor: Tensor) -> bool:
    """Whether looking at the values is free of a device sync and of tracing."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
    )


def _first(flags: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in flags.nonzero()[0])
