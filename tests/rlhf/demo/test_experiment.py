"""The whole experiment, too small to learn anything: every step runs, resumes and reports."""

import json

import pytest

from rlhf.checkpoints import RunError
from rlhf.demo import experiment
from rlhf.demo.config import DemoConfig

TINY = {
    "documents": 300,
    "small_steps": 30,
    "large_width": 56,
    "large_steps": 2,
    "demonstrations": 40,
    "ranked_prompts": 20,
    "ppo_prompts": 30,
    "ppo_iterations": 1,
    "evaluation_prompts": 20,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "demo"
    config = DemoConfig(output_dir=str(output), **TINY)
    return config, output, experiment.run(config)


def test_report_has_every_figure(finished):
    _, output, figures = finished
    stored = json.loads((output / "report.json").read_text())
    assert stored["seed"] == 0
    assert stored["seconds"] == pytest.approx(sum(stored["seconds_by_step"].values()))
    assert stored["parameters"]["small"] < stored["parameters"]["large"]
    assert set(stored["rm_accuracy"]) == {"held_out_rankings", "held_out_labellers"}
    assert set(stored["win_rate_vs_sft"]) == {"base", "base_few_shot", "large_base", "ppo", "ppo_ptx"}
    for rate in [*stored["win_rate_vs_sft"].values(), stored["win_rate_vs_large_base"]["ppo_ptx"]]:
        assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
    assert set(stored["alignment_tax"]) == {"sft", "ppo", "ppo_ptx"}
    assert stored["win_rate_vs_sft"] == figures["win_rate_vs_sft"]
    text = (output / "report.md").read_text()
    for name in ("win_rates.png", "alignment_tax.png", "training.png"):
        assert (output / name).stat().st_size > 0
        assert name in text


def test_no_stage_sees_another_stage_s_prompts(finished):
    _, output, _ = finished
    prompts = {}
    for name in ("demonstrations", "comparisons", "held_out_rankings", "prompts"):
        lines = (output / f"data/{name}.jsonl").read_text().splitlines()
        prompts[name] = {json.loads(line)["prompt"] for line in lines}
        assert prompts[name]
    names = list(prompts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not prompts[first] & prompts[second]


def test_again_without_resume_is_refused_and_loses_nothing(finished):
    config, output, _ = finished
    before = (output / "report.json").read_bytes()
    with pytest.raises(RunError, match="--resume"):
        experiment.run(config)
    assert (output / "report.json").read_bytes() == before


@pytest.mark.long
def test_resuming_a_finished_experiment_keeps_its_models_and_figures(finished):
    config, output, figures = finished
    weights = (output / "ppo_ptx/model/model.safetensors").read_bytes()
    again = experiment.run(config, resume=True)
    assert (output / "ppo_ptx/model/model.safetensors").read_bytes() == weights
    for timing in ("seconds", "seconds_by_step"):
        again.pop(timing)
    assert again == {name: figures[name] for name in again}


def test_another_seed_puts_the_present_experiment_aside(finished, tmp_path):
    output = tmp_path / "demo"
    experiment.open_directory(output, DemoConfig(output_dir=str(output), seed=3), resume=True)
    (output / "kept").write_text("kept")
    experiment.open_directory(output, DemoConfig(output_dir=str(output), seed=4), resume=True)
    aside = [path for path in tmp_path.iterdir() if path != output]
    assert [(path / "kept").read_text() for path in aside] == ["kept"]
    assert aside[0].name.startswith("demo-seed3")
