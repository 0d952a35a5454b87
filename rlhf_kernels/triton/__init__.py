"""Every op as Triton kernels, under the names and signatures of the native ops (csrc/schemas.h).

Imported only when the first op runs on this backend, since nothing else in the package needs triton.
"""

import importlib
from collections.abc import Callable
from typing import Any

from rlhf_kernels import ops

OPS: dict[str, Callable[..., Any]] = {
    name: getattr(importlib.import_module(f"rlhf_kernels.triton.{op.family}"), name)
    for op_name, op in ops.OPS.items()
    for name in (op_name, *op.derivative)
}
