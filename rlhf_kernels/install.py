"""Why a part of this install is missing: what ``setup.py`` recorded when it was built, and what the driver says."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
RECORD = PACKAGE / "_build.json"
OLDEST_CUDA = 12  # the oldest major version whose nvcc compiles the kernels


def _read() -> dict[str, Any]:
    """The record of the build: its torch, and the parts that were not built, each with its reason and remedy."""
    try:
        record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason, remedy = _never_built()
    except ValueError:
        reason, remedy = f"unknown, as {RECORD} can't be read", "install again"
    else:
        return record
    return {"torch": None, "missing": {part: {"reason": reason, "remedy": remedy} for part in ("cpu", "cuda")}}


def _never_built() -> tuple[str, str]:
    """Why there is no record, and what helps.

    Python may have been started beside the sources: it then imports those, and not the installed package.
    """
    for distribution in importlib.metadata.distributions(name="rlhf-kernels"):
        installed = Path(str(distribution.locate_file("rlhf_kernels"))).resolve()
        if installed.is_dir() and installed != PACKAGE:
            reason = f"Python took the sources in {PACKAGE} for the package, which is installed in {installed}"
            return reason, "start Python in another folder, or install the sources with pip install -e ."
    return f"{PACKAGE} holds sources, which were not built", "pip install -e ."


_RECORD = _read()
BUILT_WITH: str | None = _RECORD["torch"]
_MISSING: dict[str, dict[str, str]] = _RECORD["missing"]


def absent(part: str) -> str:
    """Why this install has no file of ``part``, one of ``cpu`` and ``cuda``."""
    if part in _MISSING:
        return f"not built: {_MISSING[part]['reason']}"
    return "built, but for another Python, or its file is gone"


def remedy(part: str) -> str | None:
    """What to do to get a part that was not built; None for a part that was."""
    return _MISSING[part]["remedy"] if part in _MISSING else None


# Installers cache what they built from a repository or an index, and a plain install would bring that back.
AGAIN = "pip install --force-reinstall --no-cache-dir, or uv pip install --reinstall --no-cache"


def driver_complaint(path: Path) -> str | None:
    """Why the driver is too old for the CUDA kernels; None if it is not, or if there is no driver. Uses no GPU."""
    library = ctypes.CDLL(str(path))
    library.rlhf_kernels_driver_is_too_old.restype = ctypes.c_bool
    built_with, driver = ctypes.c_int(), ctypes.c_int()
    if not library.rlhf_kernels_driver_is_too_old(ctypes.byref(built_with), ctypes.byref(driver)):
        return None
    return old_driver(path.name, built_with.value, driver.value)


def old_driver(name: str, built_with: int, driver: int) -> str:
    """What is wrong with a driver that knows CUDA up to ``driver`` (12080 is 12.8), and what helps."""
    major, known = built_with // 1000, driver // 1000
    # The first drivers of each major version (NVIDIA's "CUDA Compatibility", minor version compatibility).
    first = {12: "of 525 or newer", 13: "of 580 or newer"}.get(major, f"for CUDA {major}")
    other = f", or build with CUDA {known}" if known >= OLDEST_CUDA else ""
    return (
        f"{name} was built with CUDA {major}.{built_with % 1000 // 10}, which needs an NVIDIA driver {first}; this one "
        f"goes up to CUDA {known}.{driver % 1000 // 10}: install a newer driver{other}; until then GPUs run the ops on "
        "Triton"
    )
