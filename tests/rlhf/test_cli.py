"""The command: its help, its settings, and one line for everything a user can get wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tools import WORDS, metrics, only_line, start, write_jsonl

from rlhf.cli import RESUMABLE, STAGES, setting_names
from rlhf.demo.pretrain import make_tokenizer


@pytest.fixture
def bare(base, reward_model, tmp_path):
    """Models without weights: a configuration and a tokenizer. Reading their weights would fail with another error."""
    paths = []
    for path in (base, reward_model):
        paths.append(shutil.copytree(path, tmp_path / f"bare-{len(paths)}"))
        (paths[-1] / "model.safetensors").unlink()
    return SimpleNamespace(lm=str(paths[0]), reward=str(paths[1]))


@pytest.fixture
def commands(bare, data, tmp_path):
    """A command for every stage in which only the weights are missing."""
    out = ["--output_dir", tmp_path / "out"]
    short = ["--lengths.max_response_tokens", 8]
    return {
        "sft": ["--model", bare.lm, "--data", data.demonstrations, *out],
        "reward": ["--model", bare.lm, "--data", data.comparisons, *out],
        "ppo": ["--policy", bare.lm, "--reward_model", bare.reward, "--prompts", data.prompts, *out, *short],
        "evaluate": ["--model", bare.lm, "--baseline", bare.lm, "--prompts", data.prompts, *out, *short],
        "generate": ["--model", bare.lm, "--prompts", data.prompts, "--output_dir", tmp_path / "samples", *short],
        "label": ["--data", data.comparisons, *out],
    }


def test_help(rlhf):
    code, _ = rlhf("--help")
    assert code == 0
    for stage in STAGES:
        assert re.search(rf"^ +(rlhf )?{stage} ", rlhf.out, re.MULTILINE), stage


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage_names_every_setting(rlhf, stage):
    code, error = rlhf(stage, "--help")
    assert (code, error) == (0, "")
    for name in setting_names(STAGES[stage][0]):
        assert f"--{name}" in rlhf.out, name
    assert "--config" in rlhf.out
    assert "--print_config" in rlhf.out
    assert ("--resume" in rlhf.out) == (stage in RESUMABLE)
    assert STAGES[stage][0].__doc__.split("\n")[0][:40] in " ".join(rlhf.out.split())


def test_help_explains_every_setting(rlhf):
    rlhf("ppo", "--help")
    text = " ".join(rlhf.out.split())
    for words in (
        "β: the price of each nat",
        "PPO's clip ratio (C.4)",
        "Decay of the moving average",
        "Learning rate",
        "default: 0.02)",
    ):
        assert words.lower() in text.lower()
    # The help of a setting without a docstring goes from its name straight to its default.
    assert not re.search(r"--[\w.]+ [A-Z_0-9]+ \((required|type|default)", text)


@pytest.mark.parametrize("stage", STAGES)
def test_print_config_round_trips(rlhf, commands, tmp_path, stage):
    changed = ["--seed", 7]
    changed += {"sft": ["--adam.learning_rate", 1e-5], "ppo": ["--value_adam.beta2", 0.9, "--gamma_ptx", 0]}.get(
        stage, []
    )
    code, error = rlhf(stage, *commands.get(stage, []), *changed, "--print_config")
    assert code == 0, error
    printed = rlhf.out
    settings = yaml.safe_load(printed)
    assert settings["seed"] == 7
    assert {item.name for item in fields(STAGES[stage][0])} <= settings.keys()

    (tmp_path / "settings.yaml").write_text(printed)
    code, error = rlhf(stage, "--config", tmp_path / "settings.yaml", "--print_config")
    assert code == 0, error
    assert rlhf.out == printed


def test_override_of_a_file(rlhf, commands, tmp_path):
    rlhf("sft", *commands["sft"], "--print_config")
    (tmp_path / "settings.yaml").write_text(rlhf.out)
    rlhf("sft", "--config", tmp_path / "settings.yaml", "--adam.beta2", 0.5, "--print_config")
    assert yaml.safe_load(rlhf.out)["adam"] == {
        "learning_rate": 9.65e-6,
        "beta1": 0.9,
        "beta2": 0.5,
        "eps": 1e-8,
        "max_grad_norm": 1.0,
    }


@pytest.mark.parametrize(
    ("stage", "given", "nearest"),
    [
        ("ppo", "kl_coeficient", "kl_coefficient"),
        ("ppo", "gama_ptx", "gamma_ptx"),
        ("sft", "epoches", "epochs"),
        ("sft", "learning_rate", "adam.learning_rate"),
        ("reward", "batchsize", "batch_size"),
        ("evaluate", "juge", "judge"),
        ("generate", "temprature", "temperature"),
    ],
)
@pytest.mark.parametrize("where", ["flag", "flag=", "file"])
def test_unknown_setting(rlhf, commands, tmp_path, stage, given, nearest, where):
    (tmp_path / "settings.yaml").write_text(f"{given}: 1\n")
    extra = {"flag": [f"--{given}", "1"], "flag=": [f"--{given}=1"], "file": ["--config", tmp_path / "settings.yaml"]}[
        where
    ]
    code, error = rlhf(stage, *commands[stage], *extra)
    assert code == 2
    line = only_line(error)
    assert line.startswith(f"rlhf {stage}: error: {given}: no such setting")
    assert line.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize("where", ["flag", "file"])
def test_unknown_nested_setting(rlhf, commands, tmp_path, where):
    (tmp_path / "settings.yaml").write_text("adam:\n  beta_2: 0.9\n")
    extra = {"flag": ["--adam.beta_2", "0.9"], "file": ["--config", tmp_path / "settings.yaml"]}[where]
    code, error = rlhf("sft", *commands["sft"], *extra)
    assert code == 2
    assert only_line(error).endswith("did you mean adam.beta2?")


@pytest.mark.parametrize(
    ("stage", "extra", "says"),
    [
        ("ppo", ["--kl_coefficient", "-1"], "kl_coefficient: is -1.0, must be β ≥ 0"),
        ("ppo", ["--kl_coefficient=-1"], "kl_coefficient: is -1.0, must be β ≥ 0"),
        (
            "ppo",
            ["--gamma_ptx", "27.8"],
            "pretraining_data: is [], must be at least one file or data set when gamma_ptx is 27.8",
        ),
        ("ppo", ["--minibatch_size", "60"], "minibatch_size: is 60, must be a divisor of batch_size (512)"),
        ("ppo", ["--episodes", "10"], "episodes: is 10, must be at least batch_size (512)"),
        ("ppo", ["--temperature", "0"], "temperature: is 0.0, must be above 0"),
        ("ppo", ["--gamma", "1.5"], "gamma: is 1.5, must be in [0, 1]"),
        ("sft", ["--epochs", "0"], "epochs: is 0, must be at least 1"),
        ("sft", ["--adam.learning_rate", "0"], "learning_rate: is 0.0, must be above 0"),
        ("sft", ["--residual_dropout", "1"], "residual_dropout: is 1.0, must be in [0, 1)"),
        ("reward", ["--held_out_fraction", "1"], "held_out_fraction: is 1.0, must be in [0, 1)"),
        ("reward", ["--lengths.max_prompt_tokens", "0"], "max_prompt_tokens: is 0, must be at least 1"),
        ("generate", ["--samples", "0"], "samples: is 0, must be at least 1"),
    ],
)
def test_setting_out_of_range(rlhf, commands, stage, extra, says):
    code, error = rlhf(stage, *commands[stage], *extra)
    assert code == 2
    assert says in only_line(error)


def test_setting_out_of_range_in_a_file(rlhf, commands, tmp_path):
    (tmp_path / "settings.yaml").write_text("kl_coefficient: -1\n")
    code, error = rlhf("ppo", *commands["ppo"], "--config", tmp_path / "settings.yaml")
    assert code == 2
    assert "kl_coefficient: is -1.0, must be β ≥ 0" in only_line(error)


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (["--epochs", "many"], "epochs"),
        (["--epochs", "1.5"], "epochs"),
        (["--mixed_precision", "fp8"], "mixed_precision"),
    ],
)
def test_setting_of_a_wrong_type(rlhf, commands, extra, name):
    code, error = rlhf("sft", *commands["sft"], *extra)
    assert code == 2
    assert name in only_line(error)


@pytest.mark.parametrize(
    ("stage", "name"), [("sft", "model"), ("sft", "output_dir"), ("ppo", "reward_model"), ("evaluate", "baseline")]
)
def test_missing_setting(rlhf, commands, stage, name):
    words = commands[stage]
    place = words.index(f"--{name}")
    code, error = rlhf(stage, *words[:place], *words[place + 2 :])
    assert code == 2
    assert name in only_line(error)


def test_no_such_config_file(rlhf, commands):
    code, error = rlhf("sft", *commands["sft"], "--config", "no-such-recipe.yaml")
    assert code == 2
    assert "no-such-recipe.yaml" in only_line(error)


def test_config_file_that_is_no_yaml(rlhf, commands, tmp_path):
    (tmp_path / "settings.yaml").write_text("epochs: [1\n")
    code, error = rlhf("sft", *commands["sft"], "--config", tmp_path / "settings.yaml")
    assert code == 2
    only_line(error)


def test_unknown_command(rlhf):
    code, error = rlhf("stf")
    assert code == 2
    assert "sft" in only_line(error)


def test_no_command(rlhf):
    code, error = rlhf()
    assert code == 2
    only_line(error)


PROMPT = "w01 w02"
BAD = {
    "missing field": ("sft", {"prompt": PROMPT}, "completion"),
    "wrong type": ("sft", {"prompt": PROMPT, "completion": 3}, "completion"),
    "empty completion": ("sft", {"prompt": PROMPT, "completion": " "}, "completion"),
    "one completion": ("reward", {"prompt": PROMPT, "completions": ["w01"], "ranks": [1]}, "completions"),
    "ranks of another length": ("reward", {"prompt": PROMPT, "completions": ["w01", "w02"], "ranks": [1]}, "ranks"),
    "rank of a wrong type": (
        "reward",
        {"prompt": PROMPT, "completions": ["w01", "w02"], "ranks": [1, "b"]},
        "ranks[1]",
    ),
    "prompt of a wrong type": ("ppo", {"prompt": 3}, "prompt"),
    "prompt beyond the context": ("ppo", {"prompt": "w01 " * 70}, "prompt"),
    "demonstration beyond the context": ("sft", {"prompt": "w01 " * 70, "completion": "w01"}, "prompt"),
    "evaluation": ("evaluate", {"text": PROMPT}, "prompt"),
    "generation": ("generate", {"text": PROMPT}, "prompt"),
}
GOOD = {
    "sft": {"prompt": PROMPT, "completion": "w03"},
    "reward": {"prompt": PROMPT, "completions": ["w03", "w04"], "ranks": [1, 2]},
    "ppo": {"prompt": PROMPT},
    "evaluate": {"prompt": PROMPT},
    "generate": {"prompt": PROMPT},
}


def with_data(command, path):
    place = next(i for i, word in enumerate(command) if word in ("--data", "--prompts"))
    return [*command[: place + 1], path, *command[place + 2 :]]


@pytest.mark.parametrize("case", BAD)
def test_bad_record_before_any_weights_are_read(rlhf, commands, tmp_path, case):
    stage, record, name = BAD[case]
    path = write_jsonl(tmp_path / "bad.jsonl", [GOOD[stage], GOOD[stage], record])
    code, error = rlhf(stage, *with_data(commands[stage], path))
    assert code == 2
    assert f"rlhf {stage}: error: {path}:3: field '{name}'" in only_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ""),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', ":2"),
        (b'{"prompt": "\xff", "completion": "b"}\n', ":1"),
        (b"[1]\n", ":1"),
    ],
    ids=["empty", "no JSON", "no UTF-8", "no object"],
)
def test_bad_file_before_any_weights_are_read(rlhf, commands, tmp_path, content, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    code, error = rlhf("sft", *with_data(commands["sft"], path))
    assert code == 2
    assert f"rlhf sft: error: {path}{says}: " in only_line(error)
    assert not (tmp_path / "out").exists()


def test_no_such_data_file(rlhf, commands, tmp_path):
    code, error = rlhf("sft", *with_data(commands["sft"], tmp_path / "absent.jsonl"))
    assert code == 2
    assert f"{tmp_path / 'absent.jsonl'}: no such file" in only_line(error)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "evaluate", "generate"])
def test_weights_are_missing(rlhf, commands, stage):
    """The tests above rely on this: with good data, these commands go on to read the weights."""
    code, error = rlhf(stage, *commands[stage])
    assert code == 2
    assert "could not be loaded as" in only_line(error)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("sft", "model"), ("reward", "report.md"), ("ppo", "value"), ("ppo", "metrics.jsonl"),
        ("ppo", "checkpoint-100000"), ("evaluate", "config.yaml"), ("evaluate", "results.json"),
        ("evaluate", "completions.jsonl"),
    ],
)  # fmt: skip
def test_what_is_there_is_not_written_over(rlhf, commands, tmp_path, stage, name):
    """Of another run, of an evaluation that people may have judged, or of another program."""
    there = tmp_path / "out" / name
    there.mkdir(parents=True)
    (there / "kept").touch()
    code, error = rlhf(stage, *commands[stage])
    assert code == (2 if stage == "evaluate" else 1)
    assert re.search(rf"{tmp_path / 'out'}:? holds {name}", only_line(error))
    assert (there / "kept").exists()


def test_what_others_have_there_stays(rlhf, base, data, tmp_path):
    for name in ("notes.tmp", "checkpoint-500", "checkpoint-000001.bak"):
        (tmp_path / "out" / name).mkdir(parents=True)
    command = ["sft", "--model", base, "--data", data.demonstrations, "--output_dir", tmp_path / "out"]
    code, error = rlhf(*command, "--epochs", 2, "--checkpoint_every", 1, "--residual_dropout", 0)
    assert code == 0, error
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"notes.tmp", "checkpoint-500", "checkpoint-000001.bak", "model"}


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_reward_model_is_no_language_model(rlhf, commands, reward_model, stage):
    name, _, *rest = commands[stage]
    code, error = rlhf(stage, name, reward_model, *rest)
    assert code == 2
    assert only_line(error) == f"rlhf {stage}: error: {reward_model}: is a reward model, not a language model"


def test_pretraining_text_that_is_not_used(rlhf, commands, data, caplog):
    for stage, weight in (("sft", "pretraining_fraction"), ("ppo", "gamma_ptx")):
        rlhf(stage, *commands[stage], "--pretraining_data", data.texts)
        assert f"pretraining_data: is not used, since {weight} is 0" in caplog.text


def test_bad_pretraining_text(rlhf, commands, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": 3}])
    for stage, weight in (("sft", "--pretraining_fraction"), ("ppo", "--gamma_ptx")):
        code, error = rlhf(stage, *commands[stage], weight, 0.5, "--pretraining_data", path)
        assert code == 2
        assert f"{path}:1: field 'text'" in only_line(error)


def test_too_little_pretraining_text(rlhf, commands, tmp_path):
    path = write_jsonl(tmp_path / "short.jsonl", [{"text": "w01 w02"}])
    command = ["ppo", *commands["ppo"], "--gamma_ptx", 1, "--pretraining_data", path]
    code, error = rlhf(*command, "--pretraining_tokens", 16)
    assert code == 2
    assert "3 tokens, too few for one chunk of 16" in only_line(error)
    code, error = rlhf(*command)
    assert code == 2
    assert "pretraining_tokens: is 1024, must be at most 64, the context of " in only_line(error)


def test_reward_model_with_two_labels(rlhf, commands, bare):
    path = Path(bare.reward) / "config.json"
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | labels))
    code, error = rlhf("ppo", *commands["ppo"])
    assert code == 2
    assert f"{bare.reward}: has 2 labels, but a reward model has one" in only_line(error)


def test_tokenizers_that_differ(rlhf, commands, bare):
    make_tokenizer([*WORDS, "another"]).save_pretrained(bare.reward)
    code, error = rlhf("ppo", *commands["ppo"], "--value_model", bare.reward)
    assert code == 2
    assert "must share one" in only_line(error)


def test_no_such_model(rlhf, commands, tmp_path):
    command = [word if "bare" not in str(word) else tmp_path / "absent" for word in commands["sft"]]
    code, error = rlhf("sft", *command)
    assert code == 2
    assert f"{tmp_path / 'absent'}: no such directory" in only_line(error)


def test_interrupt(rlhf, commands, base, bare, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.sft.train", interrupted)
    code, error = rlhf("sft", *commands["sft"])
    assert code == 130
    assert error.strip() == "rlhf sft: interrupted; go on with --resume"


def test_the_recipe_end_to_end(rlhf, base, data, tmp_path):
    """Every command once, each on the output of the one before it."""
    common = ["--device", "cpu", "--adam.learning_rate", 1e-3]
    short = ["--lengths.max_prompt_tokens", 16, "--lengths.max_response_tokens", 8]
    texts = ["--pretraining_data", data.texts, "--pretraining_tokens", 16]

    def succeeds(*arguments):
        code, error = rlhf(*arguments)
        assert code == 0, error

    answers = tmp_path / "answers"
    sft, reward, ppo, evaluation = (tmp_path / name for name in ("sft", "reward", "ppo", "evaluation"))
    succeeds(
        "sft",
        "--model",
        base,
        "--data",
        data.demonstrations,
        "--epochs",
        2,
        "--batch_size",
        8,
        "--output_dir",
        sft,
        *common,
    )
    succeeds(
        "generate", "--model", sft / "model", "--prompts", data.prompts, "--samples", 4, "--output_dir", answers, *short
    )
    records = [json.loads(line) for line in (answers / "completions.jsonl").read_text().splitlines()]
    # The labeller prefers completions with more words.
    ranked = [
        record
        | {
            "ranks": [
                1 + sum(len(b.split()) > len(a.split()) for b in record["completions"]) for a in record["completions"]
            ]
        }
        for record in records
        if all(text.strip() for text in record["completions"])
    ]
    comparisons = write_jsonl(tmp_path / "comparisons.jsonl", ranked)
    succeeds(
        "reward", "--model", sft / "model", "--data", comparisons, "--demonstrations", data.demonstrations,
        "--batch_size", 8, "--epochs", 3, "--output_dir", reward, *common,
    )  # fmt: skip
    succeeds(
        "ppo", "--policy", sft / "model", "--reward_model", reward / "model", "--prompts", data.prompts, *texts, *short,
        "--gamma_ptx", 1, "--pretraining_per_episode", 1, "--episodes", 48, "--batch_size", 16, "--minibatch_size", 8,
        "--output_dir", ppo, *common,
    )  # fmt: skip
    succeeds(
        "evaluate", "--model", ppo / "model", "--baseline", sft / "model", "--judge", reward / "model",
        "--prompts", data.prompts, *texts, *short, "--output_dir", evaluation,
    )  # fmt: skip
    [figures] = json.loads((evaluation / "results.json").read_text())["models"]
    assert 0 <= figures["win_rate"]["low"] <= figures["win_rate"]["rate"] <= figures["win_rate"]["high"] <= 1
    assert figures.keys() >= {"kl", "reward", "alignment_tax"}
    assert [record["step"] for record in metrics(ppo)] == [0, 1, 2]
    assert yaml.safe_load((ppo / "config.yaml").read_text())["gamma_ptx"] == 1


def test_settings_are_stored_and_can_be_used_again(rlhf, base, data, tmp_path):
    """The config.yaml of a run can be given as --config, here without the name of its stage."""
    command = [
        "sft",
        "--model",
        base,
        "--data",
        data.demonstrations,
        "--epochs",
        1,
        "--device",
        "cpu",
        "--adam.beta1",
        0.8,
    ]
    code, error = rlhf(*command, "--output_dir", tmp_path / "first")
    assert code == 0, error
    stored = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert stored.pop("stage") == "sft"
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(stored))
    code, error = rlhf("sft", "--config", tmp_path / "again.yaml", "--output_dir", tmp_path / "second")
    assert code == 0, error
    first, second = (tmp_path / name / "model" / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_several_data_files(rlhf, base, data, tmp_path):
    for number in (1, 2):
        write_jsonl(tmp_path / f"{number}.jsonl", [GOOD["sft"]] * number)
    files = json.dumps([str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl")])
    code, error = rlhf(
        "sft", "--model", base, "--data", files, "--epochs", 1, "--output_dir", tmp_path / "out", "--device", "cpu"
    )
    assert code == 0, error
    assert "| demonstrations | 3 |" in (tmp_path / "out" / "report.md").read_text()


def test_help_and_bad_settings_do_not_wait_for_torch():
    """They answer before the heavy imports."""
    code = """
import sys
from rlhf import cli

sys.argv[1:] = ["ppo", "--kl_coefficient=-1"]
sys.argv += ["--output_dir", "a", "--policy", "b", "--reward_model", "c", "--prompts", "d"]
status = cli.main()
print(status, "torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "False", "False"], done.stderr


def test_module_and_exit_status(tmp_path):
    process = start("sft", "--epochs", "0", "--model", "a", "--data", "b", "--output_dir", tmp_path)
    out, error = process.communicate()
    assert process.returncode == 2
    assert out == ""
    assert only_line(error) == "rlhf sft: error: epochs: is 0, must be at least 1"


# Going on, starting from a run, and habits of other trainers -------------------------------------------------------


@pytest.fixture
def stopped(rlhf, base, data, tmp_path, monkeypatch):
    """A run of SFT that was interrupted after its fifth step, and the same run without the interrupt."""
    from rlhf import sft

    command = ["sft", "--model", base, "--data", data.demonstrations, "--epochs", 2, "--batch_size", 8]
    command += ["--checkpoint_every", 2, "--device", "cpu", "--adam.learning_rate", 2e-3]
    assert rlhf(*command, "--output_dir", tmp_path / "whole")[0] == 0
    step = sft.optimizer_step

    def interrupted(run, *arguments):
        if run.step == 5:
            raise KeyboardInterrupt
        return step(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "optimizer_step", interrupted)
        assert rlhf(*command, "--output_dir", tmp_path / "run")[0] == 130
    return SimpleNamespace(directory=tmp_path / "run", whole=tmp_path / "whole", command=command)


def weights_of(directory):
    return (directory / "model" / "model.safetensors").read_bytes()


def ways_to_go_on(directory):
    return {
        "--resume run": ["--resume", directory],
        "--resume=run": [f"--resume={directory}"],
        "--config run/config.yaml --resume": ["--config", directory / "config.yaml", "--resume"],
        "and a free setting": ["--resume", directory, "--checkpoint_every", 3],
    }


@pytest.mark.parametrize("way", ways_to_go_on(Path()))
def test_a_run_s_own_settings_are_enough_to_go_on(stopped, rlhf, way):
    code, error = rlhf("sft", *ways_to_go_on(stopped.directory)[way])
    assert code == 0, error
    assert weights_of(stopped.directory) == weights_of(stopped.whole)
    assert [record["step"] for record in metrics(stopped.directory)] == list(range(10))


def test_a_run_that_was_moved_goes_on_where_it_is(stopped, rlhf, tmp_path):
    stopped.directory.rename(tmp_path / "moved")
    assert rlhf("sft", "--resume", tmp_path / "moved")[0] == 0
    assert weights_of(tmp_path / "moved") == weights_of(stopped.whole)
    assert not stopped.directory.exists()


def test_a_setting_that_takes_a_list_may_be_given_again(rlhf, base, data, tmp_path):
    """Both files are read, in whichever way they are given. For any other setting the last value counts."""
    path = data.demonstrations
    for i, more in enumerate((["--data", path], [f"--data={path}"], ["--data", f"['{path}']", "--epochs", 1])):
        command = ["sft", "--model", base, "--epochs", 1 if i < 2 else 9, "--data", path, "--device", "cpu", *more]
        code, error = rlhf(*command, "--output_dir", tmp_path / f"run{i}")
        assert code == 0, error
        assert yaml.safe_load((tmp_path / f"run{i}" / "config.yaml").read_text())["data"] == [path, path]
        report = (tmp_path / f"run{i}" / "report.md").read_text()
        assert "| demonstrations | 80 |" in report
        assert "| epochs | 1 |" in report


def test_cli_is_a_module_that_runs():
    """Some launchers start it like this."""
    done = subprocess.run([sys.executable, "-m", "rlhf.cli", "sft"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("rlhf sft: error: ")


def test_what_resumes_nothing_says_so(stopped, rlhf, caplog, tmp_path):
    code, error = rlhf("sft", "--resume", tmp_path / "absent")
    assert code == 2
    assert only_line(error) == f"rlhf sft: error: resume: {tmp_path / 'absent'} holds no run"
    code, error = rlhf("evaluate", "--resume", stopped.whole)
    assert code == 2
    assert only_line(error) == "rlhf evaluate: error: resume: rlhf evaluate is one step, with nothing to go on from"
    code, error = rlhf(*stopped.command, "--output_dir", tmp_path / "new", "--resume")
    assert code == 0
    assert f"{tmp_path / 'new'}: holds no run to resume, so this one starts at the beginning" in caplog.text
    code, error = rlhf("sft", "--resume", stopped.whole)
    assert code == 0
    assert "sft: is finished already" in error


def test_another_stage_s_run(stopped, rlhf):
    for way in (["--resume", stopped.directory], ["--config", stopped.directory / "config.yaml"]):
        code, error = rlhf("ppo", *way)
        assert code == 2
        assert only_line(error) == "rlhf ppo: error: config: is that of a run of `rlhf sft`"


def test_a_run_s_directory_stands_for_its_model(stopped, rlhf, data, tmp_path):
    common = ["--device", "cpu", "--epochs", 1, "--batch_size", 12]
    command = ["reward", "--data", data.comparisons, *common]
    for name, model in (("a", stopped.whole), ("b", stopped.whole / "model")):
        code, error = rlhf(*command, "--model", model, "--output_dir", tmp_path / name)
        assert code == 0, error
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    code, error = rlhf(*command, "--model", stopped.directory, "--output_dir", tmp_path / "c")
    assert code == 2
    where = stopped.directory
    assert (
        only_line(error) == f"rlhf reward: error: {where}: the run there has no model yet; go on with --resume {where}"
    )


@pytest.mark.parametrize(
    ("stage", "given", "meant"),
    [
        ("sft", "lr", "adam.learning_rate"),
        ("sft", "output-dir", "output_dir"),
        ("sft", "adam.learning-rate", "adam.learning_rate"),
        ("ppo", "kl-coefficient", "kl_coefficient"),
        ("ppo", "beta", "kl_coefficient"),
        ("ppo", "max_new_tokens", "lengths.max_response_tokens"),
        ("sft", "num_train_epochs", "epochs"),
        ("reward", "per-device-train-batch-size", "batch_size"),
    ],
)
def test_settings_as_people_type_them_by_habit(rlhf, commands, stage, given, meant):
    code, error = rlhf(stage, *commands[stage], f"--{given}", 1)
    assert code == 2
    assert only_line(error) == f"rlhf {stage}: error: {given}: no such setting; did you mean {meant}?"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "evaluate", "generate"])
@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda", "device: is 'cuda', but torch 2"),
        ("cuda:3", "device: is 'cuda:3', but torch 2"),
        ("gpu", "device: is 'gpu', must be cpu, cuda or another device of torch"),
    ],
)
def test_device_that_is_not_there(rlhf, commands, bare, base, stage, device, says):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is one here")
    code, error = rlhf(stage, *commands[stage], "--device", device)
    assert code == 2
    assert only_line(error).startswith(f"rlhf {stage}: error: {says}")


def test_fp16_on_a_cpu(rlhf, commands):
    code, error = rlhf("sft", *commands["sft"], "--mixed_precision", "fp16", "--device", "cpu")
    assert code == 2
    assert only_line(error) == ("rlhf sft: error: mixed_precision: is 'fp16', which CPUs have not; bf16 runs on them")


def test_interrupted_while_libraries_load():
    code = """
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
load = builtins.__import__
def interrupted(name, *arguments, **options):
    if name == "jsonargparse":
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *arguments, **options)
builtins.__import__ = interrupted
sys.argv = ["rlhf", "sft"]
from rlhf.__main__ import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "rlhf: interrupted\n")
