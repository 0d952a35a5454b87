"""The table for a terminal, and the JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import bounds
import torch
from cases import OURS
from measure import Group, Row

COLUMNS = (
    "", "median", "quartiles", "host", "× ours", "of bound", "peak", "− grads", "error", "error of grad", "adversarial",
    "its grad",
)  # fmt: skip
CPU_TIMES = """\
median and quartiles of runs taken in turns, on small inputs each after an untimed one of the same kind, on large ones
each from a trimmed heap; above 100% of the bound where inputs stay in the caches"""
GPU_TIMES = """\
median and quartiles of the device's time, by events, of runs taken in turns, each with caches that hold nothing of its
inputs; host: median of the time until a call returns, with nothing waited for and the work of a few calls at most in
the queue; what CUDA graphs (max-autotune) keep between calls is not in the peak"""
LEGEND = """\
× ours: time over that of rlhf_kernels; of bound: share of the speed that the machine's memory and matmul allow; peak:
memory over what was in use before, and the same without the gradients that are handed back; error: largest absolute
difference from float64, of values and gradients, on random inputs and, for all but the linear ops, on adversarial ones;
"""


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def ratio_to_ours(group: Group, row: Row) -> float | None:
    """Median time over that of rlhf_kernels."""
    base = next((r for r in group.rows if r.implementation == OURS and r.times_s), None)
    return statistics.median(row.times_s) / statistics.median(base.times_s) if base and row.times_s else None


def table(groups: list[Group]) -> str:
    """A block per case, a line per implementation; whatever has not been timed is left out."""
    blocks = []
    for group in groups:
        rows = [_cells(group, row) for row in group.rows if row.times_s]
        if not rows:
            continue
        used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
        lines = [[cells[i] for i in used] for cells in (list(COLUMNS), *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        title = f"{group.op}  {group.size}  {group.dtype}  {group.step}  (bound {seconds(group.bound_s)})"
        body = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in lines]
        blocks.append("\n".join([title, *(f"  {line.rstrip()}" for line in body)]))
    times = GPU_TIMES if any(row.host_times_s for group in groups for row in group.rows) else CPU_TIMES
    return "\n\n".join([*blocks, LEGEND + times]) if blocks else "nothing was measured"


def _cells(group: Group, row: Row) -> list[str]:
    low, middle, high = quartiles(row.times_s)
    ratio = ratio_to_ours(group, row)
    peak = row.peak_extra_bytes
    aside = None if peak is None or not row.gradient_bytes else max(0, peak - row.gradient_bytes)
    kinds = ("forward", "gradient", "adversarial forward", "adversarial gradient")
    return [
        row.implementation,
        seconds(middle),
        f"{seconds(low)} – {seconds(high)}",
        seconds(row.host_s) if row.host_times_s else "",
        f"{ratio:.2f}" if ratio else "",
        percent(group.bound_s / middle),
        "" if peak is None else memory(peak),
        "" if aside is None else memory(aside),
        *(f"{row.errors[kind]:.1e}" if kind in row.errors else "" for kind in kinds),
    ]


def seconds(value: float) -> str:
    """Three digits and a unit."""
    unit, size = next(((u, x) for u, x in (("s", 1.0), ("ms", 1e-3)) if value >= x), ("µs", 1e-6))
    return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:.0f} {unit}"


def percent(share: float) -> str:
    """A percentage with two digits at least."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.2%}"


def memory(value: int) -> str:
    """Mebibytes. Below one, the counters of the resident set mean nothing."""
    return "< 1 MiB" if value < 1 << 20 else f"{value / (1 << 20):.0f} MiB"


def as_dict(
    groups: list[Group], notes: list[str], machine: dict[str, Any], rates: bounds.Rates, complete: bool
) -> dict[str, Any]:
    """Everything that was measured."""
    found = []
    for group in groups:
        entry = dataclasses.asdict(group)
        for row, cells in zip(group.rows, entry["rows"], strict=True):
            cells["median_s"] = statistics.median(row.times_s) if row.times_s else None
            cells["host_median_s"] = row.host_s if row.host_times_s else None
            cells["ratio_to_ours"] = ratio_to_ours(group, row)
            cells["share_of_bound"] = group.bound_s / cells["median_s"] if row.times_s else None
            cells["errors"] = {kind: x if math.isfinite(x) else str(x) for kind, x in row.errors.items()}
        found.append(entry)
    measured = dataclasses.asdict(rates) | {"device": str(rates.device)}
    return {"complete": complete, "machine": machine, "rates_per_s": measured, "notes": notes, "groups": found}


def read_json(path: Path, machine: dict[str, Any], device: torch.device) -> tuple[list[Group], list[str], bounds.Rates]:
    """The groups that were measured to their end, the notes and the rates of a run that was stopped.

    Raises:
        ValueError: the file is from another commit or machine, or is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, rates, groups = content["machine"], content["rates_per_s"], content["groups"]
        differ = [name for name in ("commit", "cpu", "gpu", "threads", "torch") if before[name] != machine[name]]
        if differ:
            raise ValueError(", ".join(f"{name} was {before[name]} and is now {machine[name]}" for name in differ))
        finished = [group for group in groups if all(row["peak_extra_bytes"] is not None for row in group["rows"])]
        return [_group(group) for group in finished], content["notes"], bounds.Rates(**rates | {"device": device})
    except (KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"is not the file of a run ({type(error).__name__}: {error})") from error


def _group(entry: dict[str, Any]) -> Group:
    names = {field.name for field in dataclasses.fields(Row)}
    rows = [Row(**{name: value for name, value in row.items() if name in names}) for row in entry["rows"]]
    for row in rows:
        row.errors = {kind: float(error) for kind, error in row.errors.items()}
    return Group(**entry | {"rows": rows})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the whole file or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
