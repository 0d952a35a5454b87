"""The demo's report: a table of its figures beside the paper's, and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt
from rich.table import Table

from rlhf.rates import Rate
from rlhf.report import draw_win_rates
from rlhf.tables import markdown_table
from rlhf.training import console

NAMES = {
    "base": "base",
    "base_few_shot": "base, few-shot prompt",
    "large_base": "100× larger base",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "ppo_free": "PPO, β = 0",
}
COLOURS = {"ppo": "tab:orange", "ppo_ptx": "tab:red", "ppo_free": "tab:purple"}


def write(output: Path, figures: dict[str, Any]) -> None:
    """Writes report.json, report.md and the plots, and prints the table."""
    (output / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    plot_win_rates(output / "win_rates.png", figures)
    plot_tax(output / "alignment_tax.png", figures)
    plot_course(output / "training.png", figures)
    rows = table(figures)
    (output / "report.md").write_text(page(figures, rows))
    shown = Table("figure", "here", "the paper", title="InstructGPT in miniature")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(
        f"report: [bold]{output / 'report.md'}[/] and {output / 'report.json'}; {figures['seconds']:.0f} s in all"
    )


def table(figures: dict[str, Any]) -> list[list[str]]:
    """The demo's figures beside the paper's. The paper's win rates are against its 175B SFT model."""
    parameters, accuracy = figures["parameters"], figures["rm_accuracy"]
    ratio = parameters["large"] / parameters["small"]
    sizes = f"{parameters['small']:,} and {parameters['large']:,} ({ratio:.0f}×)"
    losses = figures["pretraining_loss"]
    rows = [
        ["parameters, aligned model and large base", sizes, "1.3B and 175B (135×)"],
        ["pretraining loss of both (nats per token)", f"{losses['base']:.3f} and {losses['large_base']:.3f}", ""],
        ["agreement between labellers", f"{figures['labeller_agreement']:.1%}", "72.6 ± 1.5 %"],
        ["RM accuracy, held-out rankings", f"{accuracy['held_out_rankings']:.1%}", "72.4 ± 0.4 %"],
        ["RM accuracy, held-out labellers", f"{accuracy['held_out_labellers']:.1%}", "69.6 ± 0.9 %"],
    ]  # fmt: skip
    paper = {
        "base": "below SFT (Figure 1)",
        "base_few_shot": "between GPT-3 and SFT (Figure 1)",
        "large_base": "175B GPT-3: below SFT (Figure 1)",
        "ppo": "above SFT (Figure 1)",
        "ppo_ptx": "above SFT (Figure 1)",
    }
    for name, rate in figures["win_rate_vs_sft"].items():
        rows.append([f"win rate against SFT: {NAMES[name]}", interval(rate), paper[name]])
    rows.append(
        [
            "win rate against the 100× larger base: PPO-ptx",
            interval(figures["win_rate_vs_large_base"]["ppo_ptx"]),
            "1.3B PPO-ptx preferred to 175B GPT-3",
        ]
    )
    for name, tax in figures["alignment_tax"].items():
        rows.append(
            [
                f"alignment tax: {NAMES[name]} (nats per token)",
                f"{tax:+.3f}",
                {"ppo_ptx": "mostly gone (4.2)"}.get(name, ""),
            ]
        )
    return rows


def interval(rate: dict[str, float]) -> str:
    """A win rate with its 95 % interval."""
    return f"{rate['rate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"


def page(figures: dict[str, Any], rows: list[list[str]]) -> str:
    """report.md."""
    lines = [
        "# InstructGPT in miniature",
        "",
        f"Seed {figures['seed']}, {figures['seconds']:.0f} seconds. The judges ranked nothing for the reward model.",
        "",
        markdown_table(["figure", "here", "Ouyang et al. 2022"], rows),
        "",
        "![win rates](win_rates.png)",
        "",
        "![alignment tax](alignment_tax.png)",
        "",
        "![training](training.png)",
        "",
        "## Samples",
        "",
    ]
    for sample in figures["samples"]:
        lines += [f"**{sample['prompt']}**", ""]
        lines += [f"* {NAMES[name]}: {text or '(nothing)'}" for name, text in sample.items() if name != "prompt"]
        lines.append("")
    steps = [[name, f"{seconds:.0f}"] for name, seconds in figures["seconds_by_step"].items()]
    lines += ["## Time", "", markdown_table(["step", "seconds"], steps), ""]
    return "\n".join(lines)


def plot_win_rates(path: Path, figures: dict[str, Any]) -> None:
    """Plots win rates against the SFT model with their intervals, as in the paper's Figure 1."""
    order = ["base", "base_few_shot", "large_base", "ppo", "ppo_ptx"]
    rates = [Rate(**figures["win_rate_vs_sft"][name]) for name in order]
    figure, axes = plt.subplots(figsize=(6.5, 3.2))
    draw_win_rates(axes, [NAMES[name] for name in order], rates, [COLOURS.get(name, "tab:gray") for name in order])
    axes.text(0.51, len(order) - 0.45, "SFT", fontsize=9)
    axes.set_ylim(-0.6, len(order) - 0.1)
    axes.set_xlabel("win rate against SFT, 95 % interval")
    save(figure, path)


def plot_tax(path: Path, figures: dict[str, Any]) -> None:
    """Plots what aligning costs on pretraining text, and how much of that the pretraining mix avoids."""
    figure, axes = plt.subplots(figsize=(4.5, 3))
    for x, (name, tax) in enumerate(figures["alignment_tax"].items()):
        axes.bar(x, tax, color=COLOURS.get(name, "tab:blue"), alpha=0.8)
        axes.text(x, max(tax, 0), f"{tax:+.3f}", ha="center", va="bottom", fontsize=9)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(3), [NAMES[name] for name in figures["alignment_tax"]])
    axes.set_ylabel("pretraining loss over base\n(nats per token)")
    axes.margins(y=0.15)
    save(figure, path)


def plot_course(path: Path, figures: dict[str, Any]) -> None:
    """Plots reward, KL and gold score over training. With β = 0 the reward rises at the cost of the gold score."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.3))
    labels = [
        "reward model's score",
        "KL to the SFT model (nats per completion)",
        "gold score (labellers, without noise)",
    ]
    for panel, key, label in zip(panels, ("reward", "kl", "gold"), labels, strict=True):
        for name, points in figures["course"].items():
            known = [(point["iteration"], point[key]) for point in points if key in point]
            panel.plot(
                *zip(*known, strict=True), color=COLOURS[name], label=NAMES[name], marker="o" if key == "gold" else None
            )
        panel.set_title(label, fontsize=10)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
    panels[2].axhline(figures["gold"]["sft"], color="tab:blue", linestyle="--", linewidth=1, label="SFT")
    panels[2].legend(fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes and closes a figure."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
