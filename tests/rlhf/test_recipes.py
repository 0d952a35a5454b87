"""The shipped recipes: each is accepted by the command, with the paper's values. And docs/recipe.md's references."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import yaml

from rlhf.cli import STAGES, make_parser, recipe, setting_names
from rlhf.settings import as_plain, flatten

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "rlhf" / "recipes").glob("*/*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]
PAPER = [name for name in NAMES if not name.startswith("small/")]
PARSER = make_parser()
# What a small recipe leaves to the command line.
PATHS = {
    "sft": ["--model=m", "--data=d", "--output_dir=o"],
    "reward": ["--model=m", "--data=d", "--output_dir=o"],
    "ppo": ["--policy=p", "--reward_model=r", "--prompts=q", "--output_dir=o", "--pretraining_data=t"],
}


def stage_of(name):
    return name.partition("/")[2].split("_")[0]


@functools.cache
def parsed(name):
    """The settings that ``rlhf <stage> --config <name>`` trains with, flat."""
    stage, parser = stage_of(name), PARSER
    arguments = PATHS[stage] if name.startswith("small/") else []
    settings = parser.instantiate(parser.parse_args([stage, "--config", recipe(name), *arguments]))[stage].as_dict()
    settings.pop("config")
    settings.pop("resume")
    assert settings.pop("stage") == stage
    return flatten(as_plain(STAGES[stage][0](**settings)))


def test_every_recipe_is_there():
    stages = ["ppo", "ppo_ptx", "reward", "sft", "sft_for_ppo"]
    assert sorted(NAMES) == sorted(
        [f"{size}/{stage}" for size in ("1.3b", "6b", "175b") for stage in stages]
        + [f"small/{stage}" for stage in ("ppo", "ppo_ptx", "reward", "sft")]
    )


@pytest.mark.parametrize("name", NAMES)
def test_recipe_makes_a_config(name):
    settings = parsed(name)
    written = yaml.safe_load(Path(recipe(name)).read_text())
    flat = {
        f"{key}.{inner}" if isinstance(value, dict) else key: given
        for key, value in written.items()
        for inner, given in (value.items() if isinstance(value, dict) else [("", value)])
    }
    assert flat.keys() <= set(setting_names(STAGES[stage_of(name)][0]))
    for key, value in flat.items():
        assert settings[key] == value, key


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_says_where_it_is_from(name):
    for line in Path(recipe(name)).read_text().splitlines():
        setting, _, comment = line.partition("#")
        _, _, value = setting.partition(":")
        is_path = re.search(r"path/to|runs/", value)
        if value.strip() and not is_path:
            assert re.match(r" (paper (C|C\.\d|3\.5|E\.9)\b|choice\b)", comment), line


# The paper's figures, with the sections that give them: one for all sizes, or three for 1.3B, 6B and 175B.
FIGURES = {
    "sft": {  # C.1
        "epochs": 16, "residual_dropout": 0.2, "batch_size": (32, 32, 8),
        "adam.learning_rate": (9.65e-6, 9.65e-6, 5.03e-6), "pretraining_fraction": 0.0,
    },
    "sft_for_ppo": {  # C.3
        "epochs": 2, "pretraining_fraction": 0.1, "batch_size": (32, 32, 8),
        "adam.learning_rate": (5e-6, 1.04e-5, 2.45e-6),
    },
    "reward": {"epochs": 1, "batch_size": 64, "adam.learning_rate": 9e-6},  # C.2
    "ppo": {  # C.4
        "episodes": 256_000, "batch_size": 512, "minibatch_size": 64, "inner_epochs": 1, "kl_coefficient": 0.02,
        "clip_range": 0.2, "gamma": 1.0, "lam": 0.95, "temperature": 1.0, "ema_decay": 0.992, "warmup_iterations": 10,
        "value_adam.learning_rate": (9e-6, 9e-6, 5e-6), "value_adam.beta2": 0.95, "gamma_ptx": 0.0,
    },
}  # fmt: skip
FIGURES["ppo_ptx"] = FIGURES["ppo"] | {"gamma_ptx": 27.8, "pretraining_per_episode": 8}
EVERYWHERE = {"adam.beta1": 0.9, "adam.beta2": 0.95, "lengths.max_prompt_tokens": 1024}
EVERYWHERE |= {"lengths.max_response_tokens": 1024}


@pytest.mark.parametrize("name", PAPER)
def test_figures_of_the_paper(name):
    size, _, kind = name.partition("/")
    settings = parsed(name)
    for key, value in (FIGURES[kind] | EVERYWHERE).items():
        expected = value[("1.3b", "6b", "175b").index(size)] if isinstance(value, tuple) else value
        assert settings[key] == pytest.approx(expected, rel=1e-12), key


@pytest.mark.parametrize("name", [name for name in PAPER if "/ppo" in name])
def test_policy_learning_rate_is_within_the_sweep(name):
    rate = parsed(name)["adam.learning_rate"]
    if name.startswith("175b"):
        assert rate in (2.55e-6, 3.74e-6)
    else:
        assert 2.55e-6 <= rate <= (2.55e-5 if name.endswith("ptx") else 8.05e-6)


def test_one_reward_model_for_policies_of_every_size():
    first, *others = ({**parsed(f"{size}/reward"), "output_dir": ""} for size in ("1.3b", "6b", "175b"))
    assert all(other == first for other in others)


# `name` [file](../path): the name, with what follows it on its line, is what to search for in the file.
REFERENCE = re.compile(r"`([^`]+)` \[([\w./]+)\]\(\.\./([\w./]+)\)")
PAGE = ROOT / "docs" / "recipe.md"


def lines_with(name, path):
    """The lines of a file that hold a whole name: `epochs: int = 1` is not found in `epochs: int = 16`.

    `PPOConfig.batch_size: int = 512` is looked for in the body of that class.
    """
    text = path.read_text()
    group, _, inner = name.partition(".")
    body = re.search(rf"^class {re.escape(group)}\b.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    if inner and body:
        name, text = inner, body[0]
    whole = re.compile(r"(?<!\w)" + re.escape(name) + (r"(?!\w)" if name[-1].isalnum() else ""))
    return [line for line in text.splitlines() if whole.search(line)]


def test_references_of_the_page():
    """Each name leads to one line of the file that is linked."""
    found = REFERENCE.findall(PAGE.read_text())
    assert len(found) > 60
    assert len(found) == PAGE.read_text().count("](../") - 1  # the other link is to the recipes
    for name, shown, path in found:
        assert path.endswith(shown)
        assert len(lines_with(name, ROOT / path)) == 1, f"{path}: {name}"
