"""The paper's public benchmarks (section 4.2, appendix D), by EleutherAI's lm-eval, which defines and scores the tasks.

What aligning costs on them is the alignment tax: the figures of a model less the baseline's, with an interval.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rlhf.candidates import Candidate
from rlhf.fields import type_and_line
from rlhf.loading import ModelError
from rlhf.rates import Z, difference
from rlhf.settings import ConfigError
from rlhf.tables import markdown_table, number

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is given as an object


class Tasks:
    """Tasks of lm-eval, found before any weights are read.

    Raises:
        ConfigError: there is no task of such a name.
    """

    def __init__(self, names: Sequence[str], directory: str | None, tokens_per_forward: int):
        self.names, self.tokens_per_forward = list(names), tokens_per_forward
        if directory is not None and not Path(directory).is_dir():
            raise ConfigError(f"tasks_dir: {directory} is no directory")
        try:
            self.manager = TaskManager(include_path=directory)
        except Exception as error:  # of whatever kind reading somebody's definitions may raise
            raise ConfigError(f"tasks_dir: {directory}: {type_and_line(error)}") from error
        known = set(self.manager.all_tasks)
        for name in self.names:
            if name not in known:
                raise ConfigError(f"tasks: {name!r} is no task of lm-eval {lm_eval.__version__}, nor in tasks_dir")

    def run(self, candidate: Candidate, model: Any) -> Results:
        """A candidate's results. Its prefix goes before every example, as lm-eval's system instruction."""
        rows = max(1, self.tokens_per_forward // candidate.context)
        wrapped = HFLM(pretrained=model, tokenizer=candidate.tokenizer, batch_size=rows)
        try:
            found: Any = lm_eval.simple_evaluate(
                wrapped, tasks=self.names, task_manager=self.manager, system_instruction=candidate.prefix or None
            )
        except Exception as error:  # of a task's own code, its data or its metric
            raise ModelError(f"tasks: failed with {candidate.name}: {type_and_line(error)}") from error
        return Results(found)


class Results:
    """What lm-eval found for one model."""

    def __init__(self, found: Mapping[str, Any]):
        self.found = found
        self.values: dict[tuple[str, str], tuple[float, float | None]] = {}
        """(task, metric) → (value, standard error where there is one)."""
        for task, entries in {**found["results"], **found.get("groups", {})}.items():
            for key, value in entries.items():
                metric, _, name = key.partition(",")
                if name and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                    error = entries.get(f"{metric}_stderr,{name}")
                    known = isinstance(error, (int, float)) and math.isfinite(error)
                    self.values[task, key] = float(value), float(error) if known else None

    def figures(self, baseline: Results | None = None) -> dict[str, dict[str, Any]]:
        """By task and metric: the value, its standard error, and the difference to the baseline's."""
        figures: dict[str, dict[str, Any]] = {}
        for (task, key), (value, error) in self.values.items():
            entry: dict[str, Any] = {"value": value, "standard_error": error}
            if baseline is not None and (task, key) in baseline.values:
                entry["over_baseline"] = self.over(baseline, task, key)
            figures.setdefault(task, {})[key.removesuffix(",none")] = entry
        return figures

    def over(self, baseline: Results, task: str, key: str) -> dict[str, float | None]:
        """The difference to the baseline, example by example where the metric is their mean, which is closer.

        Its interval is that of independent figures elsewhere, and None where lm-eval gives no standard errors.
        """
        (value, error), (other, other_error) = self.values[task, key], baseline.values[task, key]
        ours, theirs = self.examples(task, key), baseline.examples(task, key)
        if len(ours) == len(theirs) > 1:
            return asdict(difference(list(zip(ours, theirs, strict=True))))
        if error is None or other_error is None:
            return {"mean": value - other, "low": None, "high": None}
        half = Z * math.hypot(error, other_error)
        return {"mean": value - other, "low": value - other - half, "high": value - other + half}

    def examples(self, task: str, key: str) -> list[float]:
        """The metric of every example, in order; none where the metric is not their mean."""
        metric, _, name = key.partition(",")
        rows = [row for row in self.found.get("samples", {}).get(task, []) if row["filter"] == name]
        values = [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]
        if not values or not all(isinstance(value, (int, float)) for value in values):
            return []
        mean = sum(values) / len(values)
        return [float(value) for value in values] if math.isclose(mean, self.values[task, key][0], abs_tol=1e-9) else []


def describe(figures: Mapping[str, Any]) -> str:
    """A table of all tasks and metrics, with the models in columns."""
    baseline, models = figures["baseline"], figures["models"]
    header = ["task", "metric", baseline["name"], *(each["name"] for each in models)]
    rows = []
    for task, metrics in baseline["tasks"].items():
        for metric, entry in metrics.items():
            cells = [written(each["tasks"][task][metric]) for each in models]
            rows.append([task, metric, written(entry), *cells])
    return markdown_table(header, rows)


def written(entry: Mapping[str, Any]) -> str:
    """A value and, of a model, the difference with its interval."""
    text = number(entry["value"])
    if "over_baseline" not in entry:
        return text
    over = entry["over_baseline"]
    interval = "" if over["low"] is None else f" [{over['low']:+.3f}, {over['high']:+.3f}]"
    return f"{text} ({over['mean']:+.3f}{interval})"
