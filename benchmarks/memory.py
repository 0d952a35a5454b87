"""Peak memory of one call, over what was in use before it, and memory that nobody uses any more."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes in use at the highest point of ``call``, less those before it; None where the system doesn't tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        return_free_memory()
        CLEAR_REFS.write_text("5")  # the resident high-water mark falls to what is resident now
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def forget(device: torch.device) -> None:
    """Frees what is left of earlier work: objects in cycles and, on a GPU, the blocks that torch keeps for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def return_free_memory() -> None:
    """Gives the memory that malloc keeps back to the system. A call that reuses it would seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
