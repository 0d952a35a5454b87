"""A run's report: what was trained, the figures that came out, and its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

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
