"""What every group of settings does: it checks its types, takes a dict for a nested group, and becomes plain data."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from rlhf.errors import UserError
from rlhf.objects import IN_MEMORY, described

# Names that people know from other trainers, and that are not spelt like ours.
HABITS = {
    "lr": "learning_rate",
    "beta": "kl_coefficient",
    "kl_coef": "kl_coefficient",
    "init_kl_coef": "kl_coefficient",
    "cliprange": "clip_range",
    "num_train_epochs": "epochs",
    "num_ppo_epochs": "inner_epochs",
    "per_device_train_batch_size": "batch_size",
    "max_new_tokens": "max_response_tokens",
    "response_length": "max_response_tokens",
    "max_length": "max_response_tokens",
    "model_name_or_path": "model",
    "dataset": "data",
    "dataset_name": "data",
    "save_steps": "checkpoint_every",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "reward_funcs": "reward",
    "reward_function": "reward",
}


class ConfigError(UserError, ValueError):
    """A setting out of range; the message names it."""


def check(condition: bool, name: str, value: Any, fits: str) -> None:
    """Raises unless ``condition`` holds."""
    if not condition:
        written = " ".join(repr(value).split())
        raise ConfigError(f"{name}: is {written if len(written) <= 80 else written[:77] + '...'}, must be {fits}")


@dataclass
class Settings:
    """A group of settings. Subclasses add the checks of ranges."""

    def __new__(cls, *_: Any, **given: Any) -> Any:
        """Refuses a setting that does not exist, with the one that may have been meant."""
        for name in given:
            if name not in hints(cast(Hashable, cls)):
                raise ConfigError(no_such_setting(name, setting_names(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for item in fields(self):
            hint: Any = hints(cast(Hashable, type(self)))[item.name]
            value: Any = as_written(getattr(self, item.name))
            if is_dataclass(hint) and isinstance(value, Mapping):
                default = cast(Any, item.default_factory)()
                value = with_changes(default, value, item.name)
            setattr(self, item.name, value)
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str) and IN_MEMORY.fullmatch(each):
                    raise ConfigError(
                        f"{item.name}: was {each} when the run was started from Python, which no file holds; "
                        "go on from there, with the same object and resume=True"
                    )
            check(fits_type(value, hint), item.name, value, in_words(hint))


@functools.cache
def hints(group: Any) -> dict[str, Any]:
    """The type of every setting of a group."""
    return get_type_hints(group, include_extras=True)


def setting_names(group: Any) -> list[str]:
    """Every setting of a group, as it is written in an override: ``adam.learning_rate``."""
    names = []
    for name, hint in hints(group).items():
        names += [f"{name}.{inner}" for inner in setting_names(hint)] if is_dataclass(hint) else [name]
    return names


def list_settings(group: Any) -> list[str]:
    """The settings of a stage that take one value or a list of values, such as ``data``."""
    return [name for name, hint in hints(group).items() if get_origin(hint) is Annotated and fits_type([], hint)]


def with_changes(settings: Any, changes: Mapping[str, Any], name: str) -> Any:
    """A group with some of its settings replaced, from a dict; errors name them as ``group.setting``."""
    known = [item.name for item in fields(settings)]
    for key in changes:
        if key not in known:
            raise ConfigError(no_such_setting(f"{name}.{key}", [f"{name}.{setting}" for setting in known]))
    try:
        return replace(settings, **changes)
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None


def no_such_setting(name: str, known: Sequence[str]) -> str:
    """The message about a setting that does not exist, with the one that may have been meant."""
    spelt = name.replace("-", "_")
    ends = {each.rpartition(".")[2]: each for each in reversed(known)}
    end = spelt.rpartition(".")[2]
    meant = spelt if spelt in known else ends.get(HABITS.get(end, ""), "")
    if not meant:
        nearest = difflib.get_close_matches(spelt, [*known, *ends], n=1, cutoff=0.4)
        meant = ends.get(nearest[0].rpartition(".")[2], "") if nearest else ""
    return f"{name}: no such setting" + (f"; did you mean {meant}?" if meant else "")


def as_written(value: Any) -> Any:
    """A value as a command line would have it, also in lists: paths and devices as text, NumPy's numbers as plain."""
    if isinstance(value, Path) or type(value).__name__ == "device":
        return str(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return [as_written(item) for item in value] if isinstance(value, (list, tuple)) else value


def fits_type(value: Any, hint: Any) -> bool:
    """Whether a value is of a type. A number must be finite and no bool, and an int is accepted for a float."""
    if get_origin(hint) is Annotated:
        written, *kinds = get_args(hint)
        return fits_type(value, written) or any(kind.holds(value) for kind in kinds)
    if get_origin(hint) in (Union, UnionType):
        return any(fits_type(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits_type(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        return number and abs(value) < math.inf
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """A type for an error message."""
    if get_origin(hint) is Annotated:
        written, *kinds = get_args(hint)
        return " or ".join([in_words(written), *(kind.name for kind in kinds)])
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(in_words(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list of {in_words(get_args(hint)[0]).removeprefix('a ')}s"
    names = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, f"{getattr(hint, '__name__', hint)} or a dict of its settings")


# Settings as text ------------------------------------------------------------------------------------------------


def as_plain(settings: Any) -> dict[str, Any]:
    """The settings as YAML can hold them. An object that came from Python becomes a line that describes it."""
    return {
        item.name: as_plain(value) if is_dataclass(value := getattr(settings, item.name)) else described(value)
        for item in fields(settings)
    }


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"adam.beta1": 0.9, ...}``: settings under the names of the command line's overrides."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
