"""Liger's fused norms, rotary embeddings and MLPs in a model, where liger-kernel is installed and knows the type."""

from __future__ import annotations

from rlhf import probe
from rlhf.models import Backbone
from rlhf.settings import ConfigError


def use_liger(model: Backbone) -> None:
    """Puts Liger's kernels into a model, by Liger's own functions. Heads and losses stay ours.

    Raises:
        ConfigError: Liger isn't installed, doesn't know the type, or there is no GPU.
        ModelError: hidden states differ from those before by more than rounding.
    """
    if model.device.type == "cpu":
        raise ConfigError("liger: is true, but Liger's kernels need a GPU, and this run is on a CPU")
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        raise ConfigError("liger: is true, but liger-kernel is not installed: pip install liger-kernel") from error
    if model.name not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"liger: is true, but this release of Liger has nothing for {model.name} models")
    with probe.same_hidden_states(model, model.tolerance, "Liger's kernels", "leave liger at false"):
        _apply_liger_kernel_to_instance(model.model, cross_entropy=False, fused_linear_cross_entropy=False)
