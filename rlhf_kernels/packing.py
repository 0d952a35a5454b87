"""Bin packing of sequences, so that a batch of rows wastes little."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

try:
    from rlhf_kernels._C import pack_sequences as _pack
except ImportError:  # an install without a compiler
    _pack = None


def pack_sequences(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: which sequences share a row.

    The longest sequence left goes where it leaves the least room (Johnson 1973): at most 11/9 of the optimal number
    of rows, plus one. Ties go to the lower index, and to the row opened first.

    Args:
        lengths: tokens of each sequence, at least 1.
        capacity: tokens that fit in a row.

    Returns:
        For each row, the indices of its sequences.

    Raises:
        ValueError: a length below 1 or above ``capacity``; names its index.
    """
    return (_pack or pack_in_python)(list(lengths), capacity)


def pack_in_python(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The same rows as ``_C.pack_sequences``, for installs without it."""
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"lengths: is {length} at index {index}, must be in [1, {capacity}], the capacity")
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
