"""Every op as Triton kernels, under the names and signatures of the native ops (csrc/schemas.h).

Imported only when the first op runs on this backend, since nothing else in the package needs triton.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import ops


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """An op that launches its kernels on the tensors' device. Triton's own choice is the current one."""

    @functools.wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *others)

    return run


OPS: dict[str, Callable[..., Any]] = {
    name: on_its_device(getattr(importlib.import_module(f"rlhf_kernels.triton.{op.family}"), name))
    for op_name, op in ops.OPS.items()
    for name in (op_name, *op.derivative)
}
