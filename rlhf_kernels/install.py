"""What the build has left in this install, and why a part of it is missing: what ``setup.py`` wrote of it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
RECORD = PACKAGE / "_build.json"


def _read() -> dict[str, dict[str, str]]:
    """The parts that were not built, each with its reason and remedy."""
    try:
        missing: dict[str, dict[str, str]] = json.loads(RECORD.read_text(encoding="utf-8"))["missing"]
    except FileNotFoundError:
        reason, remedy = _never_built()
        return {part: {"reason": reason, "remedy": remedy} for part in ("cpu", "cuda")}
    return missing


def _never_built() -> tuple[str, str]:
    """Python finds a folder of sources before an installed package, where it is started beside them."""
    for distribution in importlib.metadata.distributions(name="rlhf-kernels"):
        installed = Path(str(distribution.locate_file("rlhf_kernels"))).resolve()
        if installed.is_dir() and installed != PACKAGE:
            reason = f"Python took the sources in {PACKAGE} for the package, which is installed in {installed}"
            return reason, "start Python in another folder, or install the sources with pip install -e ."
    return f"{PACKAGE} holds sources, which were not built", "pip install -e ."


_MISSING = _read()


def absent(part: str) -> str:
    """Why this install has no ``part``, one of ``cpu`` and ``cuda``, that could be loaded."""
    if part in _MISSING:
        return _MISSING[part]["reason"]
    return "it was built, but its file is gone"


def remedy(part: str) -> str | None:
    """What would bring a part that was not built; None for one that was."""
    return _MISSING[part]["remedy"] if part in _MISSING else None
