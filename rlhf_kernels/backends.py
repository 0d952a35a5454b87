"""Which backend runs an op, and how to force one.

``RLHF_KERNELS_BACKEND=name`` or ``with use_backend("name"):`` forces a backend for every op; forcing one that this
install or this device does not have raises, and says why. Otherwise the device decides: the native kernels on the CPU
(float64 goes to the reference, which alone has it), the reference elsewhere. The Triton kernels have to be asked for:
no GPU has run them yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")


def _load() -> str | None:
    """Loads the native ops into ``torch.ops.rlhf_kernels``; why not, if not."""
    path = Path(__file__).with_name("_ops.so")
    if not path.exists():
        return "this install has no native ops: it found no C++20 compiler or no CMake when it was built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the native ops do not load ({error})"
    return None


# Why this install lacks a backend; None where it has it.
_MISSING: dict[str, str | None] = {
    "reference": None,
    "cpu": _load(),
    "triton": None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)",
    "cuda": "the CUDA kernels are not part of this version",
}


def missing(name: str) -> str | None:
    """Why this install does not have backend ``name``, one of :data:`BACKENDS`; None if it has it."""
    if name == "triton" and _MISSING[name] is None and not _interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, a thousand times slower)"
    return _MISSING[name]


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> list[str]:
    """The backends this install has."""
    return [name for name in BACKENDS if missing(name) is None]


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: is {name!r}, must be one of {', '.join(BACKENDS)}")
    reason = missing(name)
    if reason:
        raise RuntimeError(
            f"{source} asks for backend {name!r}, but {reason}; available: {', '.join(available_backends())}"
        )
    return name


def isa() -> str:
    """The instruction set whose build of the CPU kernels runs here.

    ``RLHF_KERNELS_ISA`` forces a lesser one: amx_bf16, avx512_bf16, avx512, avx2 or baseline.

    Raises:
        RuntimeError: this install has no CPU kernels, or this processor does not run the ones asked for.
    """
    if _MISSING["cpu"] is not None:
        raise RuntimeError(_MISSING["cpu"])
    library = ctypes.CDLL(str(Path(__file__).with_name("_ops.so")))
    library.rlhf_kernels_isa.restype = ctypes.c_char_p
    answer = str(library.rlhf_kernels_isa().decode())
    if answer.startswith("!"):
        raise RuntimeError(answer[1:])
    return answer


if os.environ.get("RLHF_KERNELS_ISA") and _MISSING["cpu"] is None:
    isa()  # raises where it can't be had: an op could not say why

_forced: str | None = None
if os.environ.get("RLHF_KERNELS_BACKEND"):
    _forced = _checked(os.environ["RLHF_KERNELS_BACKEND"], "RLHF_KERNELS_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every op called inside, in this process.

    Raises:
        ValueError: ``name`` is no backend.
        RuntimeError: this install does not have it; the message says why.
    """
    global _forced
    before, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def choose(first: Tensor, *others: Tensor | None) -> str:
    """The backend for an op on these tensors, which are on one device: native kernels where there are any for them.

    Raises:
        RuntimeError: the forced backend does not run on this device, or not with float64.
    """
    on_cpu = first.device.type == "cpu"
    double = first.dtype == torch.float64
    for x in others:
        double = double or (x is not None and x.dtype == torch.float64)
    if _forced is None:
        return "cpu" if on_cpu and not double and _MISSING["cpu"] is None else "reference"
    if (_forced == "cpu" and not on_cpu) or (_forced == "triton" and on_cpu and not _interpreted()):
        raise RuntimeError(f"backend {_forced!r} was asked for, but these tensors are on {first.device}")
    if _forced != "reference" and double:
        raise RuntimeError(f"backend {_forced!r} was asked for, which has no float64; the reference has")
    return _forced
