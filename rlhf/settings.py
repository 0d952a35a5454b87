"""What every group of settings does: checks its types, takes a dict for a nested group, and can be written down."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Number
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

# The other way round, jsonargparse would run the branch for type checkers, and the command line wait for torch.
if not TYPE_CHECKING:  # what a command line and a YAML file can hold
    Data: TypeAlias = list[str] | str
    Model: TypeAlias = str
    Tokenizer: TypeAlias = str
    Function: TypeAlias = str
    Functions: TypeAlias = list[str] | str
else:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Data: TypeAlias = str | Path | Dataset | list[str] | list[Path] | list[Dataset] | list[dict[str, Any]]
    Model: TypeAlias = str | Path | PreTrainedModel
    Tokenizer: TypeAlias = str | Path | PreTrainedTokenizerBase
    Function: TypeAlias = str | Callable[..., Any]
    Functions: TypeAlias = Function | list[Function] | list[str]


# What people type by habit of other trainers, where the spelling is no help.
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


class ConfigError(ValueError):
    """A setting out of range; the message names it."""


def check(condition: bool, name: str, value: Any, fits: str) -> None:
    """Raises unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{name}: is {value!r}, must be {fits}")


@dataclass
class Settings:
    """A group of settings. Subclasses add the ranges."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value: Any = getattr(self, item.name)
            hint: Any = hints(cast(Hashable, type(self)))[item.name]
            if is_dataclass(hint) and isinstance(value, Mapping):
                default = cast(Any, item.default_factory)()
                value = with_changes(default, value, item.name)
            value = paths_as_text(value)
            setattr(self, item.name, value)
            if not (is_object(value) and fits_type("", hint)):
                check(fits_type(value, hint), item.name, value, in_words(hint))


@functools.cache
def hints(group: Any) -> dict[str, Any]:
    """The type of every setting of a group."""
    return get_type_hints(group)


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


def paths_as_text(value: Any) -> Any:
    """``Path`` objects as strings, also within a list."""
    if isinstance(value, Path):
        return str(value)
    return [paths_as_text(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_object(value: Any) -> bool:
    """Whether a setting came from Python: a model, a tokenizer, a function, a data set or records."""
    items = value if isinstance(value, list) else [value]
    return any(not isinstance(item, (str, Number, type(None))) and not is_dataclass(item) for item in items)


def fits_type(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: numbers are no bools, and an int will do for a float."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits_type(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits_type(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """A type for an error message."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(in_words(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list of {in_words(get_args(hint)[0]).removeprefix('a ')}s"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, f"{getattr(hint, '__name__', hint)} or a dict of its settings")


# Settings as text ------------------------------------------------------------------------------------------------


def as_plain(settings: Any) -> dict[str, Any]:
    """The settings as YAML can hold them; what came from Python as a line that says what it was."""
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


def described(value: Any) -> Any:
    """A value as it is, or for an object its kind and a digest: a resumed run must be given the same."""
    if not is_object(value):
        return value
    name = type(value).__name__
    if hasattr(value, "state_dict"):
        tensors = value.state_dict().items()
        return f"<{name} in memory, {digest((key, t.shape, t.flatten()[:64].tolist()) for key, t in tensors)}>"
    if hasattr(value, "get_vocab"):
        return f"<{name} in memory, {digest(sorted(value.get_vocab().items()))}>"
    if callable(value):
        return f"<function {value.__module__}.{value.__qualname__}>"
    if isinstance(value, list) and not all(isinstance(item, Mapping) for item in value):
        return [described(item) for item in value]
    if hasattr(value, "__len__"):
        return f"<{len(value)} records in memory, {digest(value)}>"
    return str(value)  # torch.device("cuda"), for example


def digest(items: Iterable[Any]) -> str:
    """A short digest of what JSON can write of some items."""
    whole = hashlib.sha256()
    for item in items:
        whole.update(json.dumps(item, default=str).encode())
    return whole.hexdigest()[:12]
