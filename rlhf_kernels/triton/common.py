"""What the Triton kernels share: layouts, and arithmetic that the language lacks.

Every function here and beside it has the signature of the native op of its name (csrc/library.cpp), with arguments
checked by the public function of its family.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


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


def blocks(length: int, largest: int) -> int:
    """A power of two that holds ``length``, or the largest one allowed."""
    return min(largest, triton.next_power_of_2(max(1, length)))


@triton.jit
def span(sequence, boundaries, length, PACKED: tl.constexpr):
    """Where a sequence begins and how long it is: a row of ``length``, or what the boundaries of packed ones say."""
    base = sequence * length
    if PACKED:
        base = tl.load(boundaries + sequence).to(tl.int64)
        length = (tl.load(boundaries + sequence + 1) - base).to(tl.int32)
    return base, length


@triton.jit
def expm1_minus(x, exp_x):
    """e^x − 1 − x given e^x: from its Taylor series where the difference would cancel."""
    series = x * (1.0 / 39916800) + 1.0 / 3628800
    series = series * x + 1.0 / 362880
    series = series * x + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 1.0, series * x * x, exp_x - 1.0 - x)


@triton.jit
def kl_estimate(logprob, ref, ESTIMATOR: tl.constexpr):
    """Schulman's estimators, with d = log π − log π_ref."""
    d = logprob - ref
    if ESTIMATOR == "k2":
        return d * d * 0.5
    elif ESTIMATOR == "k3":
        return expm1_minus(-d, tl.exp(-d))
    elif ESTIMATOR == "abs":
        return tl.abs(d)
    else:
        return d


@triton.jit
def kl_slope(logprob, ref, ESTIMATOR: tl.constexpr):
    """The derivative of :func:`kl_estimate` in ``logprob``."""
    d = logprob - ref
    if ESTIMATOR == "k2":
        return d
    elif ESTIMATOR == "k3":
        # 1 − e^(−d) without cancellation
        return d - expm1_minus(-d, tl.exp(-d))
    elif ESTIMATOR == "abs":
        return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    else:
        return d * 0.0 + 1.0
