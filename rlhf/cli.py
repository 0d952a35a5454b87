"""The command ``rlhf``: one subcommand per stage, each with --config, overrides, --help and --print_config."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from rlhf import interrupts
from rlhf.config import EvaluateConfig, GenerateConfig, LabelConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf.demo.config import DemoConfig
from rlhf.errors import UserError
from rlhf.settings import ConfigError, list_settings, no_such_setting, setting_names

DESCRIPTION = """The InstructGPT recipe: supervised fine-tuning, a reward model, PPO and PPO-ptx.

  rlhf sft      demonstrations           -> the SFT model            (step 1 of the paper)
  rlhf reward   ranked completions       -> the reward model         (step 2)
  rlhf ppo      prompts, reward model    -> the policy               (step 3; --gamma_ptx 27.8 for PPO-ptx)
"""

# For each stage: its settings, the function that takes them, and its line of help. The function is given by name,
# because importing its module imports torch, and --help should not wait for that.
STAGES = {
    "sft": (SFTConfig, "rlhf.sft:train", "step 1: supervised fine-tuning on demonstrations"),
    "reward": (RewardConfig, "rlhf.reward:train", "step 2: a reward model from ranked completions"),
    "ppo": (PPOConfig, "rlhf.ppo:train", "step 3: PPO against the reward model; PPO-ptx with --gamma_ptx"),
    "evaluate": (
        EvaluateConfig,
        "rlhf.evaluate:evaluate",
        "win rate, reward, KL and alignment tax of a model against a baseline",
    ),
    "generate": (GenerateConfig, "rlhf.evaluate:generate", "sample completions, for reading or for ranking"),
    "label": (LabelConfig, "rlhf.label:label", "a page on which people rank completions or write demonstrations"),
    "demo": (DemoConfig, "rlhf.demo.experiment:run", "the whole experiment in miniature, on two CPU cores"),
}
PLAN = (
    "memory on each device and speed of a run, before anything is loaded: rlhf plan ppo --policy ... --reward_model ..."
)
# What a run must have and a plan does not look at.
NOT_PLANNED = {"sft": ["data"], "reward": ["data"], "ppo": ["prompts", "pretraining_data"]}
RESUMABLE = {"sft", "reward", "ppo", "demo"}
# What a command takes besides settings, for the parser.
RESUME_HELP = "go on from the last checkpoint in output_dir; --resume DIRECTORY alone takes the settings from there too"
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    **{stage: {"resume": {"action": "store_true", "help": RESUME_HELP}} for stage in sorted(RESUMABLE)},
    "label": {
        "export": {"metavar": "FILE", "help": "write the answers there as records, and serve no page"},
        "report": {"action": "store_true", "help": "print agreement, marks, flags and times, and serve no page"},
    },
}


# What jsonargparse says of a setting that does not exist, from the command line or from a file.
UNKNOWN = re.compile(
    r"does not accept option '([\w.-]+)'|[Oo]ption '([\w.-]+)' is not accepted|[Kk]ey '([\w.-]+)' (?:is )?not expected"
    r"|[Uu]nrecognized arguments: --([\w.-]+)"
)


class Parser(ArgumentParser):
    """Prints errors on one line, and suggests the nearest known name for a setting that is not known."""

    command_line: ClassVar[Sequence[str]] = ()

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Ends the program with status 2."""
        words = [*self.prog.split(), *self.command_line]
        stage = next((word for word in words if word in STAGES), "")
        print(f"{f'rlhf {stage}'.strip()}: error: {one_line(message, stage)}", file=sys.stderr)
        raise SystemExit(2) from ex


def one_line(message: str, stage: str) -> str:
    """Jsonargparse's message on one line, with a suggestion for a setting that does not exist."""
    unknown = UNKNOWN.search(message)
    if not unknown:
        return " ".join(message.split())
    name = next(group for group in unknown.groups() if group)
    return no_such_setting(name, setting_names(STAGES[stage][0]) if stage in STAGES else [])


def make_parser() -> Parser:
    """The parser of all subcommands."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="rlhf", allow_abbrev=False, description=DESCRIPTION, formatter_class=_formatter())
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND", help="rlhf COMMAND --help explains each")
    for name, (config, _, summary) in STAGES.items():
        sub = Parser(prog=f"rlhf {name}", allow_abbrev=False, description=(config.__doc__ or "").strip())
        sub.add_argument("--config", action="config", help="a YAML file of settings, or the name of a shipped recipe")
        sub.add_class_arguments(config)
        for option, how in OPTIONS.get(name, {}).items():
            sub.add_argument(f"--{option}", **how)
        if name in RESUMABLE:
            # A run's config.yaml names its stage. It can be given as --config, so the parser must know that key.
            sub.add_argument("--stage", default=name, help=argparse.SUPPRESS)
        subcommands.add_subcommand(name, sub, help=summary)
    subcommands.add_subcommand("plan", Parser(prog="rlhf plan", description=PLAN), help=PLAN)
    return parser


def _formatter() -> Any:
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Keeps the description's lines."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "\n".join(indent + line for line in text.splitlines())

    return Formatter


def recipe(name: str) -> str:
    """The path of the shipped recipe of that name. A name that is a file, or is no recipe, is returned unchanged."""
    shipped = resources.files("rlhf") / "recipes" / f"{name}.yaml"
    return name if Path(name).exists() or not shipped.is_file() else str(shipped)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, 2 for bad input or settings, 1 for a run that could not go on, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["plan"]:
        return plan(given[1:])
    stage, settings = parse(given)
    if settings is None:
        return 2
    options = {name: settings.pop(name) for name in OPTIONS.get(stage, {}) if name in settings}
    return run_stage(stage, settings, options)


def plan(words: list[str]) -> int:
    """Prints what a run of a stage would take."""
    parser = argparse.ArgumentParser(prog="rlhf plan", description=PLAN, allow_abbrev=False)
    parser.add_argument(
        "stage", choices=sorted(NOT_PLANNED), help="the stage; its settings follow: models must be there, data need not"
    )
    parser.add_argument("--devices", type=int, default=1, help="how many processes, each with a device (default: 1)")
    parser.add_argument("--tflops", type=float, help="a device's rate of matmuls in TFLOP/s (default: measured here)")
    parser.add_argument("--bandwidth", type=float, help="a device's memory bandwidth in GB/s (default: measured here)")
    parser.add_argument("--memory", type=float, default=80, help="GiB of a device whose rates are given (default: 80)")
    options, rest = parser.parse_known_args(words)
    if options.devices < 1:
        parser.error(f"devices: is {options.devices}, must be at least 1")
    for name in ("tflops", "bandwidth", "memory"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"{name}: is {value}, must be above 0")
    if (options.tflops is None) != (options.bandwidth is None):
        parser.error("tflops, bandwidth: one of them is given; give both, or neither to have them measured here")
    unseen = [f"--{name}=-" for name in ("output_dir", *NOT_PLANNED[options.stage])]
    stage, settings = parse([options.stage, *unseen, *rest])
    if settings is None:
        return 2
    settings.pop("resume", None)
    return run_stage(stage, settings, {}, lambda config: show_plan(config, options))


def show_plan(config: Any, options: argparse.Namespace) -> None:
    """Works the plan out, with this machine's own rates where none are given."""
    import torch

    from rlhf.plan import Machine, measured_machine, plan, show

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision, torch.float32)
    if options.tflops and options.bandwidth:
        on_gpu = config.device != "cpu"
        rates = options.tflops * 1e12, options.bandwidth * 1e9
        machine = Machine(options.devices, *rates, options.memory * 2**30, on_gpu)
    else:
        machine = measured_machine(options.devices, config.device, dtype)
    show(plan(config, machine), machine)


def parse(given: list[str]) -> tuple[str, dict[str, Any] | None]:
    """The stage and its settings, or None for those if something is wrong with them, which is printed."""
    stage = given[0] if given else ""
    try:
        argv = expand(given)
        for word, value in itertools.pairwise(argv):
            if word == "--config":
                check_stage(stage, stage_of_run(value) or stage)
        Parser.command_line = argv
        parser = make_parser()
        parsed = parser.parse_args(argv)
        stage = parsed.subcommand
        settings = parser.instantiate(parsed)[stage].as_dict()
        check_stage(stage, settings.pop("stage", stage))
    except ConfigError as error:  # `run_stage` catches those about the values of a stage's settings
        print(f"rlhf {stage}: error: {error}", file=sys.stderr)
        return stage, None
    settings.pop("config", None)
    return stage, settings


def check_stage(stage: str, other: str) -> None:
    """Raises if the settings come from a run of another stage."""
    if other != stage:
        raise ConfigError(f"config: is that of a run of `rlhf {other}`")


def stage_of_run(path: str) -> str | None:
    """The stage that a run's config.yaml names. None for any other file: the parser reads it and reports errors."""
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return settings.get("stage") if isinstance(settings, dict) else None


def expand(argv: list[str]) -> list[str]:
    """Replaces the names of shipped recipes by paths, and ``--resume DIRECTORY`` by the settings it stands for."""
    words = split_options(argv, "--config", "--resume")
    for i, word in enumerate(words[:-1]):
        if word == "--config":
            words[i + 1] = recipe(words[i + 1])
    words = gathered(words)
    if "--resume" not in words:
        return words
    at = words.index("--resume")
    before, after = words[:at], words[at + 1 :]
    if not after or after[0].startswith("-"):
        return words
    directory, *after = after
    if before[:1] and before[0] in STAGES.keys() - RESUMABLE:
        raise ConfigError(f"resume: rlhf {before[0]} is one step, with nothing to go on from")
    if not (Path(directory) / "config.yaml").is_file():
        raise ConfigError(f"resume: {directory} holds no run")
    own = ["--config", str(Path(directory) / "config.yaml"), "--output_dir", directory]
    return [*before[:1], *own, *before[1:], "--resume", *after]


def gathered(words: list[str]) -> list[str]:
    """Turns ``--data A --data B`` into ``--data [A, B]``. The parser by itself would keep only the last one."""
    stage = words[0] if words else ""
    for name in list_settings(STAGES[stage][0]) if stage in STAGES else []:
        split = split_options(words, option := f"--{name}")
        at = [i for i, word in enumerate(split[:-1]) if word == option]
        if len(at) > 1:
            values = [value for i in at for value in listed(split[i + 1])]
            rest = [word for i, word in enumerate(split) if i not in at and i - 1 not in at]
            words = [*rest, option, json.dumps(values)]
    return words


def listed(value: str) -> list[str]:
    """A setting's items, whether it was written as a list or as a single item."""
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:  # the name of a file need not be valid YAML
        found = value
    return found if isinstance(found, list) else [value]


def split_options(words: Sequence[str], *names: str) -> list[str]:
    """Splits words like ``--config=FILE`` in two, for the options of these names."""
    return [part for word in words for part in (word.split("=", 1) if word.split("=", 1)[0] in names else [word])]


def run_stage(
    stage: str, settings: dict[str, Any], options: dict[str, Any], instead: Callable[[Any], None] | None = None
) -> int:
    """Runs one stage, or something else with its settings. Prints an error that a user can fix as one line."""
    make_config, function, _ = STAGES[stage]
    name_of_command = f"rlhf plan {stage}" if instead else f"rlhf {stage}"
    hint = ""
    try:
        config = make_config(**settings)
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        # What one process has to say, all have; errors are not logged, but raised.
        logging.getLogger("rlhf").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
        if stage != "label":  # which has no models
            # Imported here, so that --help and bad settings do not wait for torch and transformers.
            from rlhf import training

            training.quiet_libraries()
        module, _, name = function.partition(":")
        start = instead or getattr(importlib.import_module(module), name)
        interrupts.allow()
        hint = "; go on with --resume" if stage in RESUMABLE else ""
        start(config, **options)
    except UserError as error:
        print(f"{name_of_command}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"\nrlhf {stage}: interrupted{hint}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        from rlhf import processes

        if not processes.another_has_ended(error):
            raise
        print(
            f"rlhf {stage}: error: another process of this run has ended, so this one ends too{hint}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    from rlhf.__main__ import start

    start()
