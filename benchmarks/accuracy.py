"""The truth, which is the reference backend in float64, and the largest absolute errors against it."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, Inputs
from torch import Tensor

import rlhf_kernels


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, without the statistics that come in a dict."""
    return [output] if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)]


def cotangent(position: int, output: Tensor) -> Tensor:
    """The gradient that reaches output ``position``: 1 for a loss, else random and exact in every dtype."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator().manual_seed(position)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output)


def truth(case: Case, inputs: Inputs, *, with_gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in float64, computed a chunk of rows at a time."""
    total = len(inputs[case.rows[0]]) if case.rows else 1
    sampled = min(total, case.sample or total)
    step = case.chunk or sampled
    whole = {name: widen(x) for name, x in inputs.items() if name not in case.rows}
    outputs: list[list[Tensor]] = []
    gradients: list[list[Tensor]] = []
    for begin in range(0, sampled, step):
        rows = slice(begin, min(begin + step, sampled))
        part = whole | {name: widen(inputs[name][rows]) for name in case.rows}
        leaves = [part[name].detach().requires_grad_(with_gradients) for name in case.gradients]
        part |= dict(zip(case.gradients, leaves, strict=True))
        with rlhf_kernels.use_backend("reference"), torch.set_grad_enabled(with_gradients):
            results = tensors(case.truth(*(part[name] for name in case.takes)))
            share = case.share(part, inputs) if case.share else 1.0
            results = [x * share if x.dim() == 0 else x for x in results]
        if with_gradients:
            sources = [(i, x) for i, x in enumerate(results) if x.requires_grad]
            arriving = [_chunk_of_cotangent(i, x, rows, total) if case.rows else cotangent(i, x) for i, x in sources]
            found = torch.autograd.grad([x for _, x in sources], leaves, arriving)
            _add(gradients, list(found), [name in case.rows for name in case.gradients])
        _add(outputs, [x.detach() for x in results], [x.dim() > 0 for x in results])
    return [torch.cat(parts) if parts[0].dim() else parts[0] for parts in outputs], [torch.cat(p) for p in gradients]


def widen(tensor: Tensor) -> Tensor:
    """Float64 for what is floating point."""
    return tensor.double() if tensor.is_floating_point() else tensor


def _chunk_of_cotangent(position: int, output: Tensor, rows: slice, total: int) -> Tensor:
    if output.dim() == 0:
        return torch.ones_like(output)
    return cotangent(position, output.new_empty((total, *output.shape[1:])))[rows]


def _add(parts: list[list[Tensor]], values: list[Tensor], concatenated: list[bool]) -> None:
    """Appends a chunk's rows to those before, and adds up what belongs to all rows."""
    if not parts:
        parts.extend([x] for x in values)
        return
    for into, value, along_rows in zip(parts, values, concatenated, strict=True):
        if along_rows:
            into.append(value)
        else:
            into[0] = into[0] + value


def largest_error(found: list[Tensor], expected: list[Tensor], valid: Tensor | None = None) -> float:
    """The largest absolute difference, over the rows that ``expected`` has; NaN where one is NaN and should not be."""
    worst = 0.0
    for x, y in zip(found, expected, strict=False):
        part = x if x.dim() == 0 else x[: len(y)]
        difference = torch.where(part == y, 0.0, (part.double() - y).abs())
        if valid is not None and valid.shape == difference.shape:
            difference = difference[valid]
        if difference.numel():
            error = float(difference.max())
            worst = error if error != error or worst != worst else max(worst, error)
    return worst
