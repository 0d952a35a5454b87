"""Data, models, tokenizers and functions as objects: Python may give these where a command line can only give names."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from rlhf.sources import is_data_set, is_splits


@dataclass(frozen=True)
class Kind:
    """A kind of object that a setting accepts besides what its written type says."""

    name: str
    """For error messages."""
    holds: Callable[[Any], bool]
    """Whether an object is of this kind."""


def is_records(value: Any) -> bool:
    """Whether a value is a data set or a list. :mod:`rlhf.sources` checks what is in it."""
    return is_data_set(value) or is_splits(value) or isinstance(value, list)


def is_model(value: Any) -> bool:
    """Whether a value is a model of transformers. Whoever has one has imported transformers, which takes seconds."""
    module = sys.modules.get("transformers")
    return module is not None and isinstance(value, module.PreTrainedModel)


def is_tokenizer(value: Any) -> bool:
    """Whether a value is a tokenizer of transformers."""
    module = sys.modules.get("transformers")
    return module is not None and isinstance(value, module.PreTrainedTokenizerBase)


def is_function(value: Any) -> bool:
    """Whether a value is a function or can be called like one. A model can be called too, but is no function here."""
    return callable(value) and not hasattr(value, "state_dict")


def is_functions(value: Any) -> bool:
    """Whether a value is a function, or a list of functions and names."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) or is_function(item) for item in items)


def is_models(value: Any) -> bool:
    """Whether a value is a model, or a list of models and names."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) or is_model(item) for item in items)


RECORDS = Kind("a list of records or a datasets.Dataset", is_records)
MODEL = Kind("a model of transformers", is_model)
MODELS = Kind("a model of transformers or a list of models", is_models)
TOKENIZER = Kind("a tokenizer of transformers", is_tokenizer)
FUNCTION = Kind("a function", is_function)
FUNCTIONS = Kind("a function or a list of functions", is_functions)

# The types of settings. The first ones say what a command line or a YAML file may hold, and list the kinds of objects
# that are accepted besides. The second ones are for type checkers.
if not TYPE_CHECKING:
    Data: TypeAlias = Annotated[list[str] | str, RECORDS]
    Model: TypeAlias = Annotated[str, MODEL]
    Models: TypeAlias = Annotated[list[str] | str, MODELS]
    Tokenizer: TypeAlias = Annotated[str, TOKENIZER]
    Judge: TypeAlias = Annotated[str, MODEL, FUNCTION]
    Functions: TypeAlias = Annotated[list[str] | str, FUNCTIONS]
else:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Table: TypeAlias = Dataset | IterableDataset
    Data: TypeAlias = str | Path | Table | list[str] | list[Path] | list[Table] | list[dict[str, Any]]
    Model: TypeAlias = str | Path | PreTrainedModel
    Models: TypeAlias = Model | list[str] | list[Path] | list[PreTrainedModel]
    Tokenizer: TypeAlias = str | Path | PreTrainedTokenizerBase
    Judge: TypeAlias = Model | Callable[..., Any]
    Functions: TypeAlias = str | Callable[..., Any] | list[str | Callable[..., Any]]


# In config.yaml --------------------------------------------------------------------------------------------------

IN_MEMORY = re.compile(r"<.+ in memory(, \w+)?>|<function .+>")
"""What :func:`described` makes of an object."""


def described(value: Any) -> Any:
    """A value as YAML can hold it. An object becomes its kind and a digest, so that a resumed run can compare them."""
    name = type(value).__name__
    if is_data_set(value):
        # The rows of a stream are not known before it has been read.
        return records_in_memory(value) if hasattr(value, "__len__") else f"<{name} in memory>"
    if is_model(value):
        return f"<{name} in memory, {digest((key, hash_of(tensor)) for key, tensor in value.state_dict().items())}>"
    if is_tokenizer(value):
        return f"<{name} in memory, {digest(sorted(value.get_vocab().items()))}>"
    if is_function(value):
        return f"<function {value.__module__}.{getattr(value, '__qualname__', name)}>"
    if isinstance(value, list):
        return records_in_memory(value) if is_list_of_records(value) else [described(item) for item in value]
    return value


def is_list_of_records(value: list[Any]) -> bool:
    """Whether a list holds dicts, and not paths or further lists."""
    return bool(value) and all(isinstance(item, Mapping) for item in value)


def records_in_memory(records: Any) -> str:
    """A line that stands for records: their number and a digest."""
    return f"<{len(records)} records in memory, {digest(records)}>"


def hash_of(tensor: Any) -> list[Any]:
    """A tensor's shape, a hash of all its bits that is the same on every device, and its first numbers."""
    import torch  # here, so that settings alone do not wait for it

    return [list(tensor.shape), torch.hash_tensor(tensor).item(), tensor.flatten()[:64].tolist()]


def digest(items: Iterable[Any]) -> str:
    """A short digest of what JSON can write of some items."""
    whole = hashlib.sha256()
    for item in items:
        whole.update(json.dumps(item, default=str).encode())
    return whole.hexdigest()[:12]
