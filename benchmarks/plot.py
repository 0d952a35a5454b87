"""Figures: how many times as long as rlhf_kernels everything else takes.

    python benchmarks/plot.py results.json summary.png    # a bar for each of the ops that most people use
    python benchmarks/plot.py again.json results.json summary.png    # what the first file has not is in the second

``run.py --plot`` draws every op with every peer.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from cases import BACKWARD, OURS
from measure import Group
from report import percent, ratio_to_ours, seconds

WIDTH_INCHES, BAR_INCHES, DPI = 9.0, 0.2, 100
OURS_COLOUR, OTHER = "#1b6ca8", "#d98c99"
COLOURS = {OURS: OURS_COLOUR, "eager": "#b0b0b0", "torch.compile": "#f0a35e", "TRL": "#7fb285", "torch lin": "#9a7fb2"}


# What the summary shows: op, dtype, step, the implementation that is compared, and what that is for a reader.
SUMMARY = (
    ("selective_log_softmax", "bfloat16", BACKWARD, "TRL", "log-probs of 512 tokens, V = 50 257: TRL"),
    ("sample_tokens", "float32", "forward", "eager", "sampling from 50 257 tokens: softmax, multinomial"),
    ("linear_ppo_policy_loss", "bfloat16", BACKWARD, "Liger GRPO loss", "policy loss from hidden states: Liger"),
    ("linear_ppo_policy_loss", "bfloat16", BACKWARD, "eager", "the same: formula in torch"),
    ("ppo_policy_loss", "float32", BACKWARD, "eager", "PPO loss of 64 × 1024 tokens: formula in torch"),
    ("kl_shaped_rewards", "float32", "forward", "eager", "rewards with KL: formula in torch"),
    ("pairwise_ranking_loss", "float32", BACKWARD, "eager", "4096 rankings of 9: formula in torch"),
    ("masked_gae whitened", "float32", "forward", "eager, verl's steps", "whitened GAE of 64 × 1024: verl's loop"),
)


@dataclass
class Bar:
    """The bar of an implementation or, without a ratio, the title of a case."""

    label: str
    at: float
    ratio: float | None = None
    text: str = ""

    @property
    def colour(self) -> str:
        """The same colour for an implementation in every case."""
        return next((colour for start, colour in COLOURS.items() if self.label.startswith(start)), OTHER)


def shown(groups: list[Group]) -> list[Group]:
    """One group per op: the first dtype, the largest case that has a peer, with its gradient where there is one."""
    best: dict[str, Group] = {}
    for group in groups:
        timed = [row.implementation for row in group.rows if row.times_s]
        if OURS not in timed or len(timed) < 2:
            continue
        known = best.setdefault(group.op, group)
        larger = (group.step == BACKWARD, group.bound_s) > (known.step == BACKWARD, known.bound_s)
        if group.dtype == known.dtype and larger:
            best[group.op] = group
    return list(best.values())


def bars_of(groups: list[Group]) -> list[Bar]:
    """The bars from top to bottom. Ours has no bar: it is the line at 1, and its time is part of the title."""
    bars: list[Bar] = []
    at = 0.0
    for group in groups:
        for row in group.rows:
            middle = statistics.median(row.times_s) if row.times_s else None
            if middle is None:
                continue
            if row.implementation == OURS:
                title = f"{group.op}, {group.size}, {group.dtype}, {group.step}: "
                bars.append(Bar(f"{title}{seconds(middle)}, {percent(group.bound_s / middle)} of bound", at))
            else:
                ratio = ratio_to_ours(group, row) or 1.0
                times = f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.2g}"
                bars.append(Bar(row.implementation, at, ratio, f" {times}×   {seconds(middle)}"))
            at += 1
        at += 0.5
    return bars


def draw(groups: list[Group], machine: str, path: Path) -> None:
    """Horizontal bars on a logarithmic axis, a block per case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    bars = bars_of(shown(groups))
    drawn = [(bar, bar.ratio) for bar in bars if bar.ratio is not None]
    if not drawn:
        return
    low, high = min(ratio for _, ratio in drawn), max(ratio for _, ratio in drawn)
    left, bottom = min(0.5, low / 1.5), bars[-1].at + 0.6
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, BAR_INCHES * bottom + 1.0), dpi=DPI, layout="constrained")
    for bar, ratio in drawn:
        axes.barh(bar.at, ratio - left, left=left, color=bar.colour, height=0.82)
        axes.annotate(bar.text, (ratio, bar.at), va="center", fontsize=8)
    for bar in bars:
        if bar.ratio is None:
            axes.text(left * 1.02, bar.at, bar.label, va="center", fontsize=8, fontweight="bold")
    axes.set_yticks([bar.at for bar, _ in drawn], [bar.label for bar, _ in drawn], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(left, max(high * 3, 4))
    axes.set_ylim(bottom, -0.8)
    axes.axvline(1, color=OURS_COLOUR, linewidth=1.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.set_xlabel(f"time, in times that of rlhf_kernels (blue line)\n{machine}", fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def draw_summary(results: list[Path], path: Path) -> None:
    """A bar for each line of SUMMARY that was measured, from the JSON files of runs on one machine, the first first.

    Raises:
        LookupError: a line was not measured.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    contents = [json.loads(file.read_text(encoding="utf-8")) for file in results]
    groups = [group for content in contents for group in content["groups"]]
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 0.34 * len(SUMMARY) + 0.9), dpi=DPI, layout="constrained")
    for at, (op, dtype, step, peer, label) in enumerate(SUMMARY):
        group = next((g for g in groups if (g["op"], g["dtype"], g["step"]) == (op, dtype, step)), {"rows": ()})
        ratio = next((row["ratio_to_ours"] for row in group["rows"] if row["implementation"] == peer), None)
        if ratio is None:
            raise LookupError(f"{', '.join(map(str, results))}: no {peer} for {op} {dtype} {step}")
        axes.barh(at, ratio - 1, left=1, color=OTHER, height=0.7)
        axes.annotate(f" {ratio:.0f}×" if ratio >= 10 else f" {ratio:.1f}×", (ratio, at), va="center", fontsize=9)
        axes.text(0.94, at, label, ha="right", va="center", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(0.94, 2000)
    axes.invert_yaxis()
    axes.axvline(1, color=OURS_COLOUR, linewidth=2)
    axes.set_axis_off()
    machine = contents[0]["machine"]
    axes.set_title(
        f"How much longer it takes without rlhf_kernels ({machine['cpu']}, {machine['threads']} threads)", fontsize=10
    )
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    *results, figure = map(Path, sys.argv[1:])
    draw_summary(results, figure)
