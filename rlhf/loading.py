"""Reads models, configurations and tokenizers. Whatever goes wrong is an error of one line.

A model is given as a directory, as a name on the hub, as the directory of a finished run (which stands for its
``model/``) or, from Python, as a model object.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import find_adapter_config_file

from rlhf import varlen
from rlhf.batch import Group
from rlhf.data import turn_end
from rlhf.errors import UserError
from rlhf.fields import first_line
from rlhf.settings import ConfigError, check

ModelSource: TypeAlias = str | Path | PreTrainedModel
"""A directory or hub name, or a model."""
WITHOUT_FLEX = ("cpu",)
"""Kinds of devices on which flex_attention can't be trained with."""
TokenizerSource: TypeAlias = ModelSource | PreTrainedTokenizerBase
"""A tokenizer, or where to find one: a directory, a hub name, or a model that was loaded from either."""


class ModelError(UserError, ValueError):
    """A model or tokenizer that cannot be used in the place where it was given."""


def name_of(source: Any) -> str:
    """The name of a model in messages."""
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def directory_of(path: str | Path) -> str:
    """The directory of a model, from its path or from that of a run. A hub name is returned unchanged.

    A path that cannot be a hub name (owner/name) must be a directory, since the hub does not have it.
    """
    path = str(path)
    directory = Path(path).expanduser()
    if not directory.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ModelError(f"{path}: no such directory")
        return path
    if (
        any((directory / name).exists() for name in ("config.json", "adapter_config.json"))
        or not (directory / "config.yaml").exists()
    ):
        return str(directory)
    if not (directory / "model").is_dir():
        raise ModelError(f"{path}: the run there has no model yet; go on with --resume {path}")
    return str(directory / "model")


def adapter_of(source: ModelSource) -> str | None:
    """The path or hub name of a model that is an adapter of peft's, which has the rest of its weights elsewhere."""
    if not isinstance(source, (str, Path)):
        return None
    path = directory_of(source)
    try:
        return path if find_adapter_config_file(path) else None
    except OSError:
        return None


def base_of(adapter: str) -> str:
    """Where the model is to which an adapter belongs."""
    found = find_adapter_config_file(adapter)
    base = json.loads(Path(found).read_text()).get("base_model_name_or_path") if found else None
    if not base:
        raise ModelError(f"{adapter}: its adapter_config.json does not say to which model it belongs")
    return str(base)


# Tokenizers ------------------------------------------------------------------------------------------------------


def load_tokenizer(source: TokenizerSource) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. It must have an end-of-sequence token, since responses end with that."""
    if isinstance(source, PreTrainedTokenizerBase):
        tokenizer, name = source, name_of(source)
    else:
        name = str(source) if isinstance(source, (str, Path)) else source.name_or_path or ""
        if not name:
            raise ModelError(
                f"{name_of(source)}: was made in memory, with no tokenizer beside it; give one as tokenizer"
            )
        path = directory_of(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            if adapter := adapter_of(name):
                return load_tokenizer(base_of(adapter))
            raise ModelError(f"{name}: no tokenizer could be loaded from there: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: the tokenizer has no eos_token, so no response could end; set one and save it again")
    return tokenizer


def other_tokenizer(first: PreTrainedTokenizerBase, other: TokenizerSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer of another model if it has other tokens than ``first``, else None.

    A model made in memory has no tokenizer to compare with. Whoever gives such a model has to know that it fits.
    """
    if other is first or (not isinstance(other, (str, Path, PreTrainedTokenizerBase)) and not other.name_or_path):
        return None
    second = load_tokenizer(other)
    same = first.get_vocab() == second.get_vocab() and first.eos_token_id == second.eos_token_id
    return None if same else second


def check_same_tokenizer(first: PreTrainedTokenizerBase, first_name: str, other: TokenizerSource) -> None:
    """Raises if two tokenizers differ where one model reads another's ids."""
    second, other_name = other_tokenizer(first, other), name_of(other)
    if second is None:
        return
    differing = set(first.get_vocab().items()) ^ set(second.get_vocab().items())
    example = (
        f", for example {min(differing)[0]!r}" if differing else f": eos is {first.eos_token!r} / {second.eos_token!r}"
    )
    raise ModelError(
        f"the tokenizers of {first_name} and {other_name} differ ({len(first)} and {len(second)} tokens{example}); "
        "they must share one"
    )


def end_token_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a completion.

    The tokenizer's EOS, those of the model's ``generation_config`` (Llama 3 lists three), and the one with which the
    chat template ends an assistant's turn.
    """
    found = {tokenizer.eos_token_id, turn_end(tokenizer)[-1]}
    if isinstance(source, (str, Path)):
        try:
            generation: Any = GenerationConfig.from_pretrained(directory_of(source))
        except OSError:  # a model need not have a generation_config
            if adapter := adapter_of(source):
                return end_token_ids(base_of(adapter), tokenizer)
            generation = load_config(source)
    else:
        generation = source.generation_config or source.config
    named = getattr(generation, "eos_token_id", None)
    return frozenset(found | set(named if isinstance(named, list) else [] if named is None else [named]))


# Models ----------------------------------------------------------------------------------------------------------


def load_config(source: ModelSource) -> Any:
    """A model's configuration without its weights, so that data can be checked before any weights are read."""
    if not isinstance(source, (str, Path)):
        return copy.deepcopy(source.config)
    path = directory_of(source)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        if adapter := adapter_of(source):
            return load_config(base_of(adapter))
        raise ModelError(f"{source}: no model could be loaded from there: {first_line(error)}") from error


def context_length(config: Any) -> int:
    """How many tokens the model can see."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31


def shared_context(*sources: ModelSource | None) -> int:
    """How many tokens all of the given models can see. None stands for a model that is not used."""
    return min(context_length(load_config(source)) for source in sources if source is not None)


def check_embedded(tokenizer: PreTrainedTokenizerBase, groups: Iterable[Group], *sources: ModelSource | None) -> None:
    """Raises if a model has no embedding for a token of the data: the tokenizer has got tokens that the model has not.

    That the tokenizer has more of them than the model is no error by itself: Gemma 3's text models lack an image's.
    None stands for a model that is not used.
    """
    highest = max((max(ids) for group in groups for ids in (group.prompt, *group.responses) if len(ids)), default=0)
    for source in (source for source in sources if source is not None):
        size = getattr(load_config(source).get_text_config(), "vocab_size", None)
        if size is not None and highest >= size:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise ModelError(
                f"{name_of(source)}: has embeddings for {size} tokens, and the data has {token!r}, number {highest} of "
                "the tokenizer; resize them (the model's resize_token_embeddings), and save the model again"
            )


def check_context(setting: str, tokens: int, *sources: ModelSource) -> None:
    """Raises ConfigError if a model cannot see sequences as long as ``tokens``, the value of ``setting``."""
    for source in sources:
        length = context_length(load_config(source))
        check(tokens <= length, setting, tokens, f"at most {length}, the context of {name_of(source)}")


def is_classifier(config: Any) -> bool:
    """Whether a configuration is that of a model with labels, not of a language model."""
    return any("SequenceClassification" in name for name in config.architectures or [])


def check_reward_config(source: ModelSource) -> Any:
    """The configuration of a reward model, which must have one label."""
    config, name = load_config(source), name_of(source)
    if not is_classifier(config):
        raise ModelError(
            f"{name}: {config.architectures or 'an unnamed model'} is not a reward model; train one with `rlhf reward`"
        )
    if config.num_labels != 1:
        raise ModelError(f"{name}: has {config.num_labels} labels, but a reward model has one")
    return config


def classifier_class(config: Any) -> Any:
    """The class that loads the sequence classifier of a model type.

    If transformers has no classifier of the type, one is made of the type's backbone and transformers' generic head.

    Raises:
        ModelError: the type is no causal language model either.
    """
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(f"{config.model_type}: transformers has neither a classifier nor a causal LM of this type")
        language_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        base = shared_base(language_model)
        members = {
            "base_model_prefix": backbone_name(language_model, config),
            # transformers takes a class of another module for custom code, and leaves computed buffers of such code
            # empty. Falcon-H1 has some.
            "__module__": base.__module__,
            "config_class": type(config),
            "made_by_rlhf": True,
        }
        made = type(classifier_name(base), (GenericForSequenceClassification, base), members)
        AutoModelForSequenceClassification.register(type(config), made, exist_ok=True)
    return AutoModelForSequenceClassification


def shared_base(model_class: type) -> Any:
    """What all classes of one model type inherit from, for example ``GranitePreTrainedModel``."""
    ancestors = (c for c in model_class.__mro__ if c.__name__.endswith("PreTrainedModel") and c is not PreTrainedModel)
    return next(ancestors)


def backbone_name(language_model: Any, config: Any) -> str:
    """The attribute in which a type's language model keeps its backbone. Llama 4's class names a wrong one."""
    with torch.device("meta"):
        built = language_model(config)
    return built.base_model_prefix if hasattr(built, built.base_model_prefix) else "model"


def classifier_name(base: type) -> str:
    """How transformers would name a type's sequence classifier."""
    return base.__name__.removesuffix("PreTrainedModel") + "ForSequenceClassification"


def loading_lines(model: PreTrainedModel) -> list[str]:
    """The lines of Python that load a saved classifier with transformers alone."""
    if not hasattr(model, "made_by_rlhf"):
        return [
            "from transformers import AutoModelForSequenceClassification",
            'model = AutoModelForSequenceClassification.from_pretrained("path/to/this/directory")',
        ]
    base, name, config = shared_base(type(model)), type(model).__name__, type(model.config)
    own = f'"base_model_prefix": "{model.base_model_prefix}", "__module__": {base.__name__}.__module__'
    lines = [
        "from transformers.modeling_layers import GenericForSequenceClassification",
        f"from {base.__module__} import {base.__name__}",
    ]
    if base.config_class is not config:  # the base of Llama 4 names the configuration that has a vision part
        lines.append(f"from {config.__module__} import {config.__name__}")
        own += f', "config_class": {config.__name__}'
    return [
        *lines,
        f'{name} = type("{name}", (GenericForSequenceClassification, {base.__name__}), {{{own}}})',
        f'model = {name}.from_pretrained("path/to/this/directory")',
    ]


def load(
    auto: Any,
    source: ModelSource,
    config: Any,
    attention: str | None,
    device: torch.device | str,
    *,
    new_head: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Loads the weights of ``source`` into a model of ``config``, as ``dtype`` on ``device``. An object's are copied.

    An adapter's change goes into the weights of the model to which it belongs.

    Raises:
        ModelError: loading fails, or weights are NaN or infinite, or weights are missing that do not belong to a
            ``new_head``: a model with random parts would train without any sign that something is wrong.
    """
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if attention:
        options["attn_implementation"] = attention
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0  # RWKV halves its weights for evaluation, and would save the halved ones
    name, path = name_of(source), None
    if adapter := adapter_of(source):
        return load_merged(auto, adapter, config, attention, device, new_head=new_head, dtype=dtype)
    if attention == varlen.NAME:
        varlen.check(config, device)
    elif attention == "flex_attention" and torch.device(device).type in WITHOUT_FLEX:
        raise ConfigError(
            "attention: flex_attention has no backward pass on a CPU; leave it out, or take another implementation"
        )
    if isinstance(source, (str, Path)):
        path = directory_of(source)
    else:
        options["state_dict"] = {key: tensor.clone() for key, tensor in source.state_dict().items()}
        if auto is AutoModelForSequenceClassification:  # it would look for the class at a path, and there is none
            auto = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    model: Any
    try:
        with quiet():
            model, info = auto.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if attention and "attn_implementation" in str(error):
            raise ConfigError(
                f"attention: is {attention!r}, which {name} does not have: {first_line(error)}"
            ) from error
        raise ModelError(f"{name}: could not be loaded as {auto.__name__}: {first_line(error)}") from error
    missing = sorted(
        key for key in info["missing_keys"] if not (new_head and key.startswith(("score.", "classifier.")))
    )
    if missing:
        listed = f"{', '.join(missing[:3])} ({len(missing)} in all)"
        raise ModelError(f"{name}: lacks weights of {type(model).__name__}: {listed}")
    check_weights(name, model)
    use_fused_gelu(model)
    return model.to(device)


def load_merged(
    auto: Any,
    adapter: str,
    config: Any,
    attention: str | None,
    device: torch.device | str,
    *,
    new_head: bool,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The model to which an adapter belongs, with the adapter's change in its weights. Arguments are :func:`load`'s."""
    import peft  # takes a second, which only those wait for who have an adapter

    base = base_of(adapter)
    try:
        settings = peft.PeftConfig.from_pretrained(adapter)
        settings.task_type = None  # peft's classes for tasks want more of a model than that it has these layers
        of_head = not new_head and is_classifier(config) and not is_classifier(load_config(base))
        if of_head and not getattr(settings, "modules_to_save", None):
            raise ModelError(f"{adapter}: lacks the head of {config.architectures[0]}, and {base} has none")
        model = load(auto, base, config, attention, device, new_head=new_head or of_head, dtype=dtype)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            adapted: Any = peft.PeftModel.from_pretrained(model, adapter, config=settings)
            merged: PreTrainedModel = adapted.merge_and_unload()
        if lacking := [str(warning.message) for warning in told if "missing adapter keys" in str(warning.message)]:
            raise ModelError(f"{adapter}: the adapter does not fit {type(model).__name__}: {lacking[0][:200]}")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{adapter}: the adapter could not be loaded: {first_line(error)}") from error
    check_weights(adapter, merged)
    return merged.requires_grad_(True)


def check_weights(name: str, model: nn.Module) -> None:
    """Raises if a weight is NaN or infinite."""
    spoilt = [key for key, weight in model.named_parameters() if not all_finite(weight)]
    if spoilt:
        listed = f"{', '.join(spoilt[:3])} ({len(spoilt)} in all)"
        raise ModelError(f"{name}: has weights that are NaN or infinite: {listed}; was its training stopped at a NaN?")


def use_fused_gelu(model: nn.Module) -> None:
    """Puts torch's GELU in place of those that transformers writes out, in eight passes over memory.

    It is the same function: they differ by rounding. GPT-2 and its kin spend a tenth of a training step in it.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, FastGELUActivation)):
                setattr(module, name, nn.GELU(approximate="tanh"))


@torch.no_grad()
def all_finite(weight: torch.Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite. Minimum and maximum show that without a copy of the tensor."""
    return weight.numel() == 0 or bool(torch.stack(torch.aminmax(weight)).isfinite().all())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' own report and progress bars on loading. :func:`load` reports what matters of them."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
