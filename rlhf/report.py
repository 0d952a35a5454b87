"""A run's report: what was trained, the figures that came out, and its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from rlhf.rates import Rate
from rlhf.tables import markdown_table, number

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from rlhf.training import Run


def write(run: Run, title: str, rows: Mapping[str, Any], curves: Sequence[Sequence[str]]) -> None:
    """Writes ``report.md`` with a table of ``rows``, and ``curves.png`` with one panel for each group of metrics."""
    if not run.is_main:
        return
    plot_history(run.history, curves, run.directory / "curves.png")
    text = [f"# {title}", "", markdown_table(["", ""], [[name, number(value)] for name, value in rows.items()])]
    text += [
        "",
        "![curves](curves.png)",
        "",
        f"Settings: `config.yaml`. Every step: `metrics.jsonl`. Seed {run.config.seed}.",
    ]
    (run.directory / "report.md").write_text("\n".join(text) + "\n")


def plot_history(history: Sequence[Mapping[str, Any]], curves: Sequence[Sequence[str]], path: Path) -> None:
    """One panel per group of metrics that were recorded, over the steps."""
    recorded = set().union(*history)
    groups = [[name for name in group if name in recorded] for group in curves]
    groups = [group for group in groups if group]
    figure, panels = plt.subplots(1, max(len(groups), 1), figsize=(4 * max(len(groups), 1), 3), squeeze=False)
    for panel, group in zip(panels[0], groups, strict=False):
        for name in group:
            points = [(record["step"], record[name]) for record in history if name in record]
            panel.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1.2)
        panel.set_title(", ".join(group).replace("_", " "), fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_win_rates(rates: Mapping[str, Rate], baseline: str, path: Path) -> None:
    """Win rates against a baseline with their intervals, as in the paper's Figure 1."""
    figure, axes = plt.subplots(figsize=(6.5, 1.4 + 0.45 * len(rates)))
    draw_win_rates(axes, list(map(end_of, rates)), list(rates.values()), ["tab:orange"] * len(rates))
    axes.invert_yaxis()
    axes.set_xlabel(f"win rate against {end_of(baseline)}, 95 % interval")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def draw_win_rates(axes: Any, names: Sequence[str], rates: Sequence[Rate], colours: Sequence[str]) -> None:
    """A bar for each rate, from below, with its interval."""
    for y, (rate, colour) in enumerate(zip(rates, colours, strict=True)):
        axes.barh(y, rate.rate, color=colour, alpha=0.8)
        axes.plot([rate.low, rate.high], [y, y], color="black", linewidth=2)
        axes.text(max(rate.high, 0.02) + 0.01, y, f"{rate.rate:.0%}", va="center", fontsize=9)
    axes.axvline(0.5, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rates)), names)
    axes.set_xlim(0, 1)


def end_of(name: str) -> str:
    """A name that leaves room for a plot: paths differ at their ends."""
    end = name if len(name) <= 40 else "…" + name[-39:]
    return end.replace("$", r"\$")  # which begins a formula
