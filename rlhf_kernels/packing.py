"""Bin packing of sequences, so that the rows of a batch hold little padding."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

MOST = 2**63 - 1  # the native module counts in int64

_pack: Callable[[list[int], int], list[list[int]]] | None
try:
    from rlhf_kernels._C import pack_sequences as _pack
except ImportError:  # an install without a compiler
    _pack = None


def pack_sequences(lengths: Iterable[int] | Tensor, capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: which sequences share a row.

    The longest sequence that is left goes into the row where it leaves the least room (Johnson 1973). This takes at
    most 11/9 of the optimal number of rows, plus one. Ties go to the lower index, and to the row opened first.

    Args:
        lengths: tokens of each sequence, at least 1: any iterable of integers, a 1-D tensor or array too.
        capacity: tokens that fit in a row, at least 1.

    Returns:
        For each row, the indices of its sequences.

    Raises:
        TypeError: ``lengths`` is not iterable, or a length (named by its index) or ``capacity`` is not an integer.
        ValueError: a length below 1 or above ``capacity``, with its index; or a capacity below 1.
    """
    capacity = _integer("capacity", capacity)
    if not 1 <= capacity <= MOST:
        raise ValueError(f"capacity: is {capacity}, must be in [1, {MOST}]")
    if isinstance(lengths, Tensor):
        lengths = lengths.tolist()
    if not isinstance(lengths, Iterable):
        raise TypeError(f"lengths: is {lengths!r}, must be an iterable of integers")
    checked = [_integer("lengths", length, index) for index, length in enumerate(lengths)]
    for index, length in enumerate(checked):
        if not 1 <= length <= capacity:
            raise ValueError(f"lengths: is {length} at index {index}, must be in [1, {capacity}], the capacity")
    return (_pack or pack_in_python)(checked, capacity)


def _integer(name: str, value: Any, index: int | None = None) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    where = "" if index is None else f" at index {index}"
    raise TypeError(f"{name}: is {value!r}{where}, must be an integer")


def pack_in_python(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The same rows as ``_C.pack_sequences``, for installs without it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect.bisect_left(room, (length, 0))
        if at == len(room):
            rows.append([index])
            left, row = capacity - length, len(rows) - 1
        else:
            left, row = room.pop(at)
            rows[row].append(index)
            left -= length
        bisect.insort(room, (left, row))
    return rows
