"""Benchmarks by lm-eval, on tasks whose data lie here."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from tools import WORDS, only_line, write_jsonl

from rlhf.rates import difference

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

CHOICE = """
task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
FREE = """
task: go_on
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  max_gen_toks: 6
  until: ["w53"]
metric_list:
  - metric: bleu
    aggregation: bleu
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path):
    """The directory of two tasks."""
    draw = random.Random(0)
    records = []
    for _ in range(40):
        at = draw.randrange(50)
        choices = [f" {WORDS[at + 3]}", *(f" {draw.choice(WORDS)}" for _ in range(2))]
        records.append({"question": " ".join(WORDS[at : at + 3]), "choices": choices, "answer": 0})
    data = write_jsonl(tmp_path / "questions.jsonl", records)
    directory = tmp_path / "tasks"
    directory.mkdir()
    for name, text in (("next_word", CHOICE), ("go_on", FREE)):
        (directory / f"{name}.yaml").write_text(text.format(data=data))
    return directory


def by_lm_eval(model, tasks, output, *options):
    """The figures that lm-eval itself finds, by task and metric."""
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
    ]
    command += ["--tasks", "next_word,go_on", "--include_path", tasks, "--device", "cpu", "--output_path", output]
    subprocess.run([str(word) for word in [*command, *options]], check=True, capture_output=True)
    [path] = output.rglob("results_*.json")
    return json.loads(path.read_text())["results"]


def test_figures_are_those_of_lm_eval(rlhf, base, sft_model, tasks, tmp_path):
    command = ["evaluate", "--model", sft_model, "--baseline", base, "--tasks", "next_word,go_on", "--device", "cpu"]
    code, error = rlhf(*command, "--tasks_dir", tasks, "--output_dir", tmp_path / "out")
    assert code == 0, error
    figures = json.loads((tmp_path / "out/results.json").read_text())
    [ours] = figures["models"]
    theirs = by_lm_eval(sft_model, tasks, tmp_path / "theirs")
    assert ours["tasks"].keys() == {"next_word", "go_on"}
    for task, metric in (("next_word", "acc"), ("go_on", "bleu")):
        found = ours["tasks"][task][metric]
        assert found["value"] == theirs[task][f"{metric},none"]
        assert found["standard_error"] == pytest.approx(theirs[task][f"{metric}_stderr,none"], rel=0.3)
    accuracy, baseline = (side["tasks"]["next_word"]["acc"] for side in (figures["models"][0], figures["baseline"]))
    assert accuracy["value"] > baseline["value"] > 0
    over = accuracy["over_baseline"]
    assert over["mean"] == pytest.approx(accuracy["value"] - baseline["value"])
    assert over["low"] < over["mean"] < over["high"]
    page = (tmp_path / "out/report.md").read_text()
    assert f"| next_word | acc | {baseline['value']:.4g} | {accuracy['value']:.4g} ({over['mean']:+.3f} [" in page


@pytest.fixture
def sft_model(sft_config):
    """A model that has learned which word follows."""
    from rlhf import sft

    return str(sft.train(sft_config(epochs=30)))


def test_differences_are_of_examples_where_they_can_be():
    """Four examples; the standard error of a mean of differences is not that of two independent means."""
    from rlhf.lm_eval_tasks import Results

    def results(values, bleu):
        entries = {"acc,none": sum(values) / 4, "acc_stderr,none": 0.25, "bleu,none": bleu, "bleu_stderr,none": 3.0}
        entries |= {"f1,strict": bleu, "f1_stderr,strict": "N/A"}
        rows = [{"doc_id": i, "filter": "none", "acc": value, "bleu": ["a", "b"]} for i, value in enumerate(values)]
        return Results({"results": {"t": entries}, "samples": {"t": rows[::-1]}})

    baseline = results([1, 0, 0, 1], 10.0)
    found = results([1, 1, 0, 1], 14.0).figures(baseline)["t"]
    expected = difference([(1, 1), (1, 0), (0, 0), (1, 1)])
    assert found["acc"]["over_baseline"] == {"mean": 0.25, "low": expected.low, "high": expected.high}
    half = 1.96 * 18**0.5
    assert found["bleu"]["over_baseline"] == {
        "mean": 4,
        "low": pytest.approx(4 - half),
        "high": pytest.approx(4 + half),
    }
    assert found["f1,strict"]["over_baseline"] == {"mean": 4, "low": None, "high": None}
    assert found["f1,strict"]["standard_error"] is None


@pytest.mark.long
def test_a_prefix_goes_before_every_example(rlhf, base, tasks, tmp_path):
    """As lm-eval has it go there."""
    prefix = tmp_path / "prefix.txt"
    prefix.write_text("w40 w41 w42 w43\n")
    command = ["evaluate", "--model", base, "--baseline", base, "--tasks", "next_word", "--device", "cpu"]
    code, error = rlhf(*command, "--tasks_dir", tasks, "--prefix", prefix, "--output_dir", tmp_path / "out")
    assert code == 0, error
    figures = json.loads((tmp_path / "out/results.json").read_text())
    theirs = by_lm_eval(base, tasks, tmp_path / "theirs", "--system_instruction", "w40 w41 w42 w43\n")
    assert figures["models"][0]["tasks"]["next_word"]["acc"]["value"] == theirs["next_word"]["acc,none"]


def test_no_such_task(rlhf, base, tmp_path):
    command = ["evaluate", "--model", base, "--baseline", base, "--device", "cpu", "--output_dir", tmp_path / "out"]
    code, error = rlhf(*command, "--tasks", "hellaswag,no_such_task")
    assert code == 2
    assert only_line(error).startswith("rlhf evaluate: error: tasks: 'no_such_task' is no task of lm-eval")


def test_a_task_that_fails(rlhf, base, tasks, tmp_path):
    (tmp_path / "questions.jsonl").unlink()
    command = ["evaluate", "--model", base, "--baseline", base, "--device", "cpu", "--output_dir", tmp_path / "out"]
    code, error = rlhf(*command, "--tasks", "next_word", "--tasks_dir", tasks)
    assert code == 2
    assert f"rlhf evaluate: error: tasks: failed with {base}" in error.splitlines()[-1]
    assert "Traceback" not in error
