"""Which backend runs an op, and how to force one.

``RLHF_KERNELS_BACKEND=name`` or ``with use_backend("name"):`` forces a backend for every op; forcing one that this
install or this device does not have raises, and says why. Otherwise the device decides.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlhf_kernels import reference

BACKENDS = ("reference", "cpu", "triton", "cuda")

# The backends this version has, each a package with one module per op family, and why the others are missing.
_PACKAGES = {"reference": reference}
_MISSING = {
    "cpu": "the native CPU kernels are not part of this version",
    "triton": "the Triton kernels are not part of this version",
    "cuda": "the CUDA kernels are not part of this version",
}


def missing(name: str) -> str | None:
    """Why this install does not have backend ``name``, one of :data:`BACKENDS`; None if it has it."""
    return _MISSING.get(name)


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


def choose(device: torch.device) -> str:
    """The backend for tensors on ``device``."""
    return _forced or "reference"


def dispatch(family: str, function: str, device: torch.device) -> Callable[..., Any]:
    """``function`` of ``rlhf_kernels/<backend>/<family>.py``."""
    return getattr(getattr(_PACKAGES[choose(device)], family), function)
