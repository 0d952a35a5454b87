"""What the Triton kernels share: layouts, and arithmetic that the language lacks.

In the files beside this one, the functions named after ops have the signatures of the native ops (csrc/schemas.h).
Their arguments have been checked by the public functions of the families.
"""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops import OPS

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_WHOLE_EXPONENT = tl.constexpr(88.0)  # e^x is finite in float32 up to here


def rows_of(tensor: Tensor) -> Tensor:
    """(..., V) as (outer, inner, V) with a unit last stride: a view where the leading strides allow one."""
    shape = tensor.shape
    if tensor.stride(-1) != 1 and shape[-1] > 1:
        tensor = tensor.contiguous()
    if tensor.dim() == 1:
        return tensor[None, None]
    if tensor.dim() == 2:
        return tensor[None]
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(1, -1, shape[-1])


def places(op: str, *names: str) -> list[tl.constexpr]:
    """The positions of these statistics in an op's tensor of statistics."""
    return [tl.constexpr(OPS[op].statistics.index(name)) for name in names]


def blocks(length: int, largest: int) -> int:
    """A power of two that holds ``length``, or the largest one allowed."""
    return min(largest, triton.next_power_of_2(max(1, length)))


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, if there is one, as kernels that know nothing of strides take it."""
    return None if tensor is None else tensor.contiguous()


def two_floats(number: float) -> tuple[float, float]:
    """A number rounded to float32, as kernels take numbers, and what the rounding lost."""
    rounded = ctypes.c_float(number).value
    return rounded, number - rounded


@triton.jit
def load_mask(mask, at, here):
    """Which of the positions ``at`` a mask of any dtype keeps, all of them if it is None; False where not ``here``."""
    kept = here
    if mask is not None:
        kept = tl.load(mask + at, mask=here, other=0).to(tl.float32) != 0
    return kept


@triton.jit
def span(sequence, boundaries, length, PACKED: tl.constexpr):
    """Where a sequence begins and how long it is: a row of ``length`` if padded, as the boundaries say if packed."""
    base = sequence * length
    if PACKED:
        base = tl.load(boundaries + sequence).to(tl.int64)
        length = (tl.load(boundaries + sequence + 1) - base).to(tl.int32)
    return base, length


@triton.jit
def scaled_by_power(x, n):
    """x·2^n for an integral n. 2^n may be no normal number, so it is applied as two factors that are."""
    k = n.to(tl.int32)
    half = k >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    return x * first * ((k - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x):
    """e^x, what its rounding lost, and e^x − 1 − x without cancellation: as in csrc/include/rlhf_kernels/math.h.

    ``tl.exp`` takes 2 to a rounded power, which loses a digit at 20 and would make the losses' errors larger than
    those of the plain formula.
    """
    bounded = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))  # NaN stays
    n = tl.floor(bounded * LOG2_E + 0.5)
    high = bounded - n * 0.693359375  # exact: ln 2's first part has few digits
    r = high + n * 2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    r_lost = (high - r) + n * 2.12194440e-4
    one_and_r = r + 1.0
    rest = p * (r * r) + ((r - (one_and_r - 1.0)) + r_lost)
    whole = one_and_r + rest
    value = scaled_by_power(whole, n)
    lost = scaled_by_power((one_and_r - whole) + rest, n)
    less_line = tl.where(n == 0, p * (r * r), value - ((x + 1.0) - lost))
    return value, lost, less_line
