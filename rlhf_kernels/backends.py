"""Which backend runs an op, and how to force one.

``RLHF_KERNELS_BACKEND=name`` or ``with use_backend("name"):`` forces a backend for every op. If this install,
this device or the op does not have that backend, the op raises an error that says why. Otherwise the device decides.
The CPU runs the native kernels, and NVIDIA GPUs from Ampere on run what :mod:`rlhf_kernels.ops` says. Everything else
runs on the reference, and so does float64, which no other backend has.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rlhf_kernels import install
from rlhf_kernels.ops import OPS

BACKENDS = ("reference", "cpu", "triton", "cuda")

OLDEST_GPU = (8, 0)
DOUBLE = torch.float64

# Where tests/native has built csrc/cuda as a library that runs on CPU tensors.
_EMULATED_CUDA = os.environ.get("RLHF_KERNELS_EMULATED_CUDA")
_INTERPRETED_TRITON = os.environ.get("TRITON_INTERPRET") == "1"


def _load(path: Path, absent: str) -> str | None:
    """Loads a library of ops. Returns why it could not be loaded, or None if it was."""
    if not path.exists():
        return absent
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error.__cause__ or error})"  # torch names the file, its cause the reason
    return None


def _load_cpu() -> str | None:
    return _load(install.PACKAGE / "_ops.so", install.absent("cpu"))


def _load_cuda() -> str | None:
    if _EMULATED_CUDA:
        path, absent = Path(_EMULATED_CUDA), f"RLHF_KERNELS_EMULATED_CUDA names {_EMULATED_CUDA}, which is not there"
        return _load(path, absent) or install.driver_complaint(path)
    path = install.PACKAGE / "_cuda.so"
    if path.exists() and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA, so {path.name} is not loaded"
    if path.exists() and _MISSING["cpu"] is not None:
        return f"the ops' schemas are missing: {_MISSING['cpu']}"
    return _load(path, install.absent("cuda")) or install.driver_complaint(path)


# Why this install lacks a backend; None where it has it.
_MISSING: dict[str, str | None] = {
    "reference": None,
    "cpu": _load_cpu(),
    "triton": None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)",
}
_MISSING["cuda"] = _load_cuda()


def missing(name: str) -> str | None:
    """Why this install does not have backend ``name``, one of :data:`BACKENDS`; None if it has it."""
    if name in ("triton", "cuda") and _MISSING[name] is None and not emulated(name) and not torch.cuda.is_available():
        hint = " (TRITON_INTERPRET=1 runs the kernels on a CPU, a thousand times slower)" if name == "triton" else ""
        return "torch sees no GPU" + hint
    return _MISSING[name]


def has(name: str) -> bool:
    """Whether this install has backend ``name``."""
    return missing(name) is None


def emulated(name: str) -> bool:
    """Whether a GPU's backend runs on the CPU here, as in the tests."""
    return bool(_EMULATED_CUDA) if name == "cuda" else name == "triton" and _INTERPRETED_TRITON


def available_backends() -> list[str]:
    """The backends this install has."""
    return [name for name in BACKENDS if has(name)]


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
    """The instruction set of the CPU kernels that run here; they are built once for each.

    ``RLHF_KERNELS_ISA`` forces another: amx_bf16, avx512_bf16, avx512, avx2 or baseline. 64-bit Arm has
    neon alone.

    Raises:
        RuntimeError: this install has no CPU kernels, or this processor does not run the ones asked for.
    """
    if _MISSING["cpu"] is not None:
        raise RuntimeError(_MISSING["cpu"])
    library = ctypes.CDLL(str(install.PACKAGE / "_ops.so"))
    library.rlhf_kernels_isa.restype = ctypes.c_char_p
    answer = str(library.rlhf_kernels_isa().decode())
    if answer.startswith("!"):
        raise RuntimeError(answer[1:])
    return answer


if os.environ.get("RLHF_KERNELS_ISA") and _MISSING["cpu"] is None:
    isa()  # raises if this processor lacks it: an op could not say why

_forced: str | None = None
_refused: Exception | None = None
if os.environ.get("RLHF_KERNELS_BACKEND"):
    try:
        _forced = _checked(os.environ["RLHF_KERNELS_BACKEND"], "RLHF_KERNELS_BACKEND")
    except (ValueError, RuntimeError) as error:
        _refused = error  # the first op raises it, so that `python -m rlhf_kernels` still runs


def refused() -> Exception | None:
    """Why the backend that RLHF_KERNELS_BACKEND names can't be had; None if it can, or none is named."""
    return _refused


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


@functools.cache
def _warn(reason: str, remedy: str) -> None:
    """Warns, once per process, that ops run on the reference because the kernels are missing."""
    warnings.warn(
        f"rlhf_kernels: ops run on the reference, slower than the kernels, which are missing here ({reason}). To have "
        f"them: {remedy}; RLHF_KERNELS_BACKEND=reference says that this is meant; `python -m rlhf_kernels` tells more",
        stacklevel=5,  # the line that called the op
    )


def _on_cpu() -> str:
    reason = _MISSING["cpu"]
    if reason is None:
        return "cpu"
    if not torch.compiler.is_compiling():
        _warn(reason, install.remedy("cpu") or "install rlhf-kernels again, with torch 2.10 or newer")
    return "reference"


def _on_gpu(op: str) -> str:
    return next((name for name in OPS[op].on_gpu if has(name)), "reference")


@functools.cache
def _on_this_gpu(op: str, device: torch.device) -> str:
    is_served = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= OLDEST_GPU
    return _on_gpu(op) if is_served else "reference"


def choose(op: str, first: Tensor, *others: Tensor | None) -> str:
    """The backend for an op on these tensors, which are all on one device: its kernels, where it has any.

    Raises:
        RuntimeError: the forced backend is not there, does not run on this device, or does not have this op or float64.
        ValueError: RLHF_KERNELS_BACKEND names no backend.
    """
    double = first.dtype is DOUBLE
    for x in others:
        if x is not None and x.dtype is DOUBLE:
            double = True
    if _forced is None:
        if _refused is not None:
            raise _refused
        if double:
            return "reference"
        if first.is_cpu:
            return _on_cpu()
        if not first.is_cuda:
            return "reference"
        # Compiled code can't ask a device what it is, so any GPU is taken for one that the kernels run on.
        return _on_gpu(op) if torch.compiler.is_compiling() else _on_this_gpu(op, first.device)
    if _forced == "reference":
        return _forced
    if first.device.type != ("cpu" if _forced == "cpu" or emulated(_forced) else "cuda"):
        raise RuntimeError(f"backend {_forced!r} was asked for, but these tensors are on {first.device}")
    if double:
        raise RuntimeError(f"backend {_forced!r} was asked for, which has no float64; the reference has")
    if _forced == "cuda" and "cuda" not in OPS[op].on_gpu:
        raise RuntimeError(f"backend 'cuda' was asked for, which does not have {op}; on GPUs it is in 'triton'")
    return _forced
