"""LoRA (Hu et al. 2021, arXiv 2106.09685) by ``peft``: a few weights beside each layer are trained, the others stay.

A model with an adapter is two models: with the adapter off it is the one that training began with. So in PPO the policy
is its own reference, and the value model is the reward model.

peft is imported where it is used: that takes seconds, for which only runs with an adapter should wait.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config import LoRA
from rlhf.fields import first_line
from rlhf.loading import ModelSource, adapter_of, directory_of, name_of
from rlhf.settings import ConfigError

if TYPE_CHECKING:
    from rlhf.models import Backbone

NAME = "default"
"""Of the adapter, in the names of its weights."""


def add_adapter(model: Backbone, lora: LoRA, source: ModelSource, *, merged: bool) -> None:
    """Adds an adapter, which changes nothing yet, to a model from ``source``. From here on only the adapter is trained.

    A scalar model's head is trained whole: the adapter has a copy of it. ``merged``: whether the result is to be saved
    as a whole model.

    Raises:
        ConfigError: there are no such modules, or one that can't have an adapter; or the model is an adapter itself,
            and the result is to be one as well.
    """
    import peft

    if not merged and adapter_of(source):
        raise ConfigError(
            f"lora.merge: is false, but {name_of(source)} is an adapter itself, on which no other can be saved; "
            "with --lora.merge true the result is a whole model"
        )
    alpha: Any = lora.alpha if lora.alpha is not None else 2 * lora.rank
    head_name: Any = getattr(model, "head_name", None)  # of a scalar model
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=[head_name] if head_name else None,
        task_type="SEQ_CLS" if head_name else "CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GPT-2's transposed weights, which are seen to
            peft.inject_adapter_in_model(config, model.model, NAME)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora.target_modules: {first_line(error)}") from error
    where = directory_of(source) if isinstance(source, (str, Path)) else source.name_or_path or ""
    config.base_model_name_or_path = str(Path(where).absolute()) if Path(where).is_dir() else where
    head: Any = model.model.get_output_embeddings()
    if hasattr(head, "base_layer") and model.model.config.get_text_config().tie_word_embeddings:
        raise ConfigError(
            "lora.target_modules: names the output embeddings, which are the input embeddings as well; leave them out"
        )
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_("lora_" in name or f".modules_to_save.{NAME}." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether :func:`add_adapter` has been here."""
    return bool(getattr(model, "peft_config", None))


@contextlib.contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before it had an adapter. A model without one stays as it is."""
    if not has_adapter(model):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
    # peft's own switch also sets requires_grad, of which FSDP makes copies while the adapter is off.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def save_adapter(model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor] | None) -> None:
    """Writes an adapter as ``peft`` reads it, with the configuration of its model. ``weights`` as for a model."""
    import peft

    state: Any = weights or model.state_dict()
    found = peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=NAME)
    directory.mkdir(parents=True)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in found.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = copy.copy(model.peft_config[NAME])
    config.inference_mode = True
    config.save_pretrained(str(directory))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


@torch.no_grad()
def save_merged(model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor] | None) -> None:
    """Writes the model with its adapter's change in its weights. Those in memory stay as they are."""
    state: Any = dict(weights or model.state_dict())
    merged = {}
    for name, tensor in state.items():
        if "lora_" in name or ".original_module." in name:
            continue
        plain = name.replace(f".modules_to_save.{NAME}.", ".")
        if name.endswith(".base_layer.weight"):
            at = name.removesuffix(".base_layer.weight")
            layer: Any = model.get_submodule(at)
            change = state[f"{at}.lora_B.{NAME}.weight"].float() @ state[f"{at}.lora_A.{NAME}.weight"].float()
            change = layer.scaling[NAME] * (change.T if layer.fan_in_fan_out else change)
            merged[f"{at}.weight"] = (tensor.float() + change).to(tensor.dtype).cpu()
        else:
            merged[plain.replace(".base_layer.", ".")] = tensor.cpu()
    with torch.device("meta"):
        empty = type(model)(model.config)
    if model.can_generate():
        empty.generation_config = model.generation_config
    # What is tied is one tensor in the model, and must be so here.
    for name, other in empty.all_tied_weights_keys.items():
        merged[name] = merged[other]
    empty.save_pretrained(directory, state_dict=merged)
