"""Calls from Python: settings may be objects that a command line cannot hold."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tools import only_line, tiny_gpt2
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rlhf
from rlhf.checkpoints import RunError
from rlhf.loading import ModelError, load_tokenizer
from rlhf.models import ScalarModel
from rlhf.objects import described
from rlhf.records import DataError


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def weights(path):
    return load_file(Path(path) / "model.safetensors")


def same(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


SFT = {"epochs": 1, "batch_size": 8, "device": "cpu", "adam": {"learning_rate": 1e-3}}


@pytest.fixture
def by_path(base, data, tmp_path):
    """The result of the same run from files."""
    config = rlhf.SFTConfig(model=base, data=data.demonstrations, output_dir=tmp_path / "by_path", **SFT)
    return rlhf.sft.train(config)


def test_stages_are_there_after_import_and_torch_is_not():
    code = """
import sys, rlhf
rlhf.SFTConfig, rlhf.PPOConfig, rlhf.RewardConfig, rlhf.EvaluateConfig, rlhf.GenerateConfig, rlhf.ConfigError
assert issubclass(rlhf.DataError, ValueError)
assert "torch" not in sys.modules
for stage in (rlhf.sft, rlhf.reward, rlhf.ppo):
    assert callable(stage.train)
assert callable(rlhf.evaluate.evaluate) and callable(rlhf.evaluate.generate)
try:
    rlhf.dpo
except AttributeError as error:
    assert str(error) == "module 'rlhf' has no attribute 'dpo'"
assert rlhf.ModelError is sys.modules["rlhf.loading"].ModelError
assert rlhf.RunError is sys.modules["rlhf.training"].RunError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["list", "data set", "path", "list of paths"])
def test_data(kind, by_path, base, data, tmp_path):
    given = {
        "list": lambda: records(data.demonstrations),
        "data set": lambda: Dataset.from_list(records(data.demonstrations)),
        "path": lambda: Path(data.demonstrations),
        "list of paths": lambda: [Path(data.demonstrations)],
    }[kind]()
    config = rlhf.SFTConfig(model=Path(base), data=given, output_dir=tmp_path / "run", **SFT)
    assert same(rlhf.sft.train(config), by_path)
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    path = data.demonstrations
    expected = {"path": path, "list of paths": [path]}.get(kind)
    assert kept["data"] == expected if expected else kept["data"].startswith("<40 records in memory, ")
    assert kept["adam"]["learning_rate"] == 1e-3
    assert kept["adam"]["beta2"] == 0.95


def test_objects(by_path, base, data, tmp_path):
    """A model and a tokenizer: the run is the same, and the model is left as it was."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), load_tokenizer(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = rlhf.SFTConfig(
        model=model, tokenizer=tokenizer, data=records(data.demonstrations), output_dir=tmp_path / "run", **SFT
    )
    assert same(rlhf.sft.train(config), by_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert kept["model"].startswith("<GPT2LMHeadModel in memory, ")
    assert kept["tokenizer"].startswith("<TokenizersBackend in memory, ") or " in memory, " in kept["tokenizer"]


def test_model_without_its_tokenizer(data, tmp_path):
    made = tiny_gpt2(57, 1)
    config = rlhf.SFTConfig(model=made, data=data.demonstrations, output_dir=tmp_path / "run", **SFT)
    with pytest.raises(ModelError, match="GPT2LMHeadModel: was made in memory, with no tokenizer beside it"):
        rlhf.sft.train(config)


def test_whole_recipe_from_objects(base, data, tmp_path):
    """Each stage takes the model of the one before it, loaded by transformers."""
    tokenizer = load_tokenizer(base)
    sft = AutoModelForCausalLM.from_pretrained(
        rlhf.sft.train(
            rlhf.SFTConfig(model=base, data=records(data.demonstrations), output_dir=tmp_path / "sft", **SFT)
        )
    )
    comparisons = Dataset.from_list(records(data.comparisons))
    options = {"device": "cpu", "tokenizer": tokenizer}
    ranker = rlhf.reward.train(
        rlhf.RewardConfig(model=sft, data=comparisons, output_dir=tmp_path / "reward", batch_size=8, **options)
    )
    reward_model = AutoModelForSequenceClassification.from_pretrained(ranker)
    config = rlhf.PPOConfig(
        policy=sft, reward_model=reward_model, prompts=records(data.prompts), output_dir=tmp_path / "ppo", episodes=16,
        batch_size=8, minibatch_size=8, lengths={"max_response_tokens": 6}, reward=lambda completions, **_: [
            len(text) for text in completions
        ], **options,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(rlhf.ppo.train(config))
    figures = rlhf.evaluate.evaluate(
        rlhf.EvaluateConfig(
            model=policy,
            baseline=sft,
            judge=reward_model,
            prompts=records(data.prompts)[:8],
            output_dir=tmp_path / "evaluation",
            lengths={"max_response_tokens": 6},
            **options,
        )
    )
    assert 0 <= figures["models"][0]["win_rate"]["rate"] <= 1
    preferred = rlhf.evaluate.evaluate(
        rlhf.EvaluateConfig(
            model=policy,
            baseline=sft,
            judge=lambda prompt, a, b: 1.0,
            prompts=records(data.prompts)[:8],
            output_dir=tmp_path / "preferred",
            lengths={"max_response_tokens": 6},
            **options,
        )
    )
    assert preferred["models"][0]["win_rate"]["rate"] == 1.0


def test_an_error_leaves_nothing_behind(base, data, tmp_path):
    """The corrected call can then use the same directory."""
    directory = tmp_path / "run"
    good = {"model": base, "data": data.demonstrations, "output_dir": directory, **SFT}
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (damaged / name).write_bytes((Path(base) / name).read_bytes())
    (damaged / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    bad = [
        ({"data": [{"prompt": "w01"}]}, DataError),
        ({"data": 7}, rlhf.ConfigError),
        ({"model": str(damaged)}, ModelError),
        ({"attention": "no_such_attention"}, rlhf.ConfigError),
        ({"held_out_fraction": 0.999}, rlhf.ConfigError),
    ]
    for change, error in bad:
        with pytest.raises(error):
            rlhf.sft.train(rlhf.SFTConfig(**good | change))
        assert not directory.exists(), change
    rlhf.sft.train(rlhf.SFTConfig(**good))
    with pytest.raises(RunError, match="holds a run already"):
        rlhf.sft.train(rlhf.SFTConfig(**good))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"adam": {"lr": 1e-3}}, r"adam\.lr: no such setting; did you mean adam\.learning_rate\?"),
        ({"adam": {"learning_rate": -1}}, r"adam\.learning_rate: is -1, must be above 0"),
        ({"adam": {"learning_rate": "high"}}, r"adam\.learning_rate: is 'high', must be a finite number"),
        ({"adam": {"learning_rate": float("inf")}}, r"adam\.learning_rate: is inf, must be a finite number"),
        ({"lr": 1e-3}, r"lr: no such setting; did you mean adam\.learning_rate\?"),
        ({"output_dir": {}}, r"output_dir: is \{\}, must be a string"),
        ({"output_dir": ""}, "output_dir: is '', must be a directory"),
        ({"output_dir": "~/run"}, "output_dir: is '~/run', must be a directory with its home written out"),
        ({"tokenizer": {}}, r"tokenizer: is \{\}, must be a string or a tokenizer of transformers or null"),
        ({"model": torch.nn.Linear(2, 2)}, r"model: is Linear\(.*, must be a string or a model of transformers"),
        ({"data": {"prompt": ["a"]}}, "data: is .* or a list of records or a datasets.Dataset"),
        (
            {"data": Dataset.from_list([])},
            r"data: is Dataset\(\{ features: .*\}\), must be at least one",
        ),
        ({"adam": 1e-3}, r"adam: is 0\.001, must be Adam or a dict of its settings"),
        ({"epochs": 1.5}, r"epochs: is 1\.5, must be an integer"),
        ({"epochs": True}, "epochs: is True, must be an integer"),
        ({"epochs": object()}, "epochs: is <object object at .*, must be an integer"),
        ({"mixed_precision": "fp8"}, "mixed_precision: is 'fp8', must be one of no, bf16, fp16"),
        ({"residual_dropout": None}, "residual_dropout: is None, must be a finite number"),
        ({"data": 7}, "data: is 7, must be a list of strings or a string"),
        ({"model": ""}, "model: is '', must be"),
        ({"residual_dropout": float("nan")}, "residual_dropout: is nan"),
    ],
)
def test_errors_name_the_setting(change, says):
    with pytest.raises(rlhf.ConfigError, match=says):
        rlhf.SFTConfig(**{"model": "m", "data": "d", "output_dir": "o"} | change)


def test_numbers_of_numpy_and_tensors():
    config = rlhf.SFTConfig(
        model="m", data="d", output_dir="o", epochs=np.int64(3), residual_dropout=np.float32(0.5),
        pretraining_tokens=torch.tensor(7), adam={"learning_rate": np.float64(1e-3)}, device=torch.device("cpu"),
    )  # fmt: skip
    plain = [config.epochs, config.residual_dropout, config.pretraining_tokens, config.adam.learning_rate]
    assert plain == [3, 0.5, 7, 1e-3]
    assert [type(value) for value in plain] == [int, float, int, float]
    assert config.device == "cpu"


class Longest:
    def __call__(self, completions, **_):
        return [len(text) for text in completions]


@pytest.mark.parametrize("function", [Longest(), functools.partial(Longest(), more=1)])
def test_what_can_be_called_is_a_function(function, base, data, tmp_path):
    config = rlhf.PPOConfig(
        policy=base, reward=function, prompts=data.prompts, output_dir=tmp_path / "run", episodes=8, batch_size=8,
        minibatch_size=8, lengths={"max_response_tokens": 4}, device="cpu",
    )  # fmt: skip
    rlhf.ppo.train(config)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["reward"][0].startswith("<function ")


def test_a_stream(by_path, base, data, tmp_path):
    stream = Dataset.from_list(records(data.demonstrations)).to_iterable_dataset()
    config = rlhf.SFTConfig(model=base, data=stream, output_dir=tmp_path / "run", **SFT)
    assert same(rlhf.sft.train(config), by_path)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"] == "<IterableDataset in memory>"


def test_a_run_of_objects_goes_on_from_python(request, base, data, tmp_path):
    rlhf.sft.train(rlhf.SFTConfig(model=base, data=records(data.demonstrations), output_dir=tmp_path / "run", **SFT))
    code, error = request.getfixturevalue("rlhf")("sft", "--resume", tmp_path / "run")
    assert code == 2
    assert re.match(
        "rlhf sft: error: data: was <40 records in memory, .*> when the run was started from Python, .*resume=True",
        only_line(error),
    )


def test_one_number_of_a_model_is_another_model(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    before = described(model)
    assert described(model) == before
    with torch.no_grad():
        model.transformer.wte.weight[-1, -1] += 1e-6
    assert described(model) != before


def test_libraries_stay_quiet_and_as_they_were(base, capfd):
    """What transformers says on loading a classifier from a language model's weights is not for the user."""
    transformers.utils.logging.set_verbosity_info()
    transformers.utils.logging.enable_progress_bar()
    try:
        ScalarModel.load(base)
        assert transformers.utils.logging.get_verbosity() == transformers.logging.INFO
        assert transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.set_verbosity_warning()
    shown = capfd.readouterr()
    assert "LOAD REPORT" not in shown.err + shown.out
    assert "Loading weights" not in shown.err + shown.out


def test_a_group_keeps_its_stage_s_defaults():
    config = rlhf.PPOConfig(output_dir="o", policy="p", reward_model="r", prompts="q", adam={"beta1": 0.8})
    assert (config.adam.beta1, config.adam.learning_rate, config.adam.eps) == (0.8, 5e-6, 1e-5)


def test_a_resumed_run_must_be_given_the_same_objects(base, data, tmp_path):
    given = records(data.demonstrations)
    settings = {"model": base, "output_dir": tmp_path / "run", **SFT}
    path = rlhf.sft.train(rlhf.SFTConfig(data=given, **settings))
    assert rlhf.sft.train(rlhf.SFTConfig(data=list(given), **settings), resume=True) == path
    with pytest.raises(RunError, match=r"data was '<40 records in memory, .*' and is now '<39 records in memory, "):
        rlhf.sft.train(rlhf.SFTConfig(data=given[1:], **settings), resume=True)


def test_two_runs_of_one_process_may_differ_in_precision(base, data, tmp_path):
    for precision in ("no", "bf16", "no"):
        config = rlhf.SFTConfig(
            model=base, data=data.demonstrations, output_dir=tmp_path / f"{precision}{len(list(tmp_path.iterdir()))}",
            mixed_precision=precision, **SFT,
        )  # fmt: skip
        rlhf.sft.train(config)
    assert same(tmp_path / "no0/model", tmp_path / "no2/model")
    assert not same(tmp_path / "no0/model", tmp_path / "bf161/model")
