"""What has a model take less memory: blocks that are run again in the backward pass, and 16-bit weights."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from rlhf import probe
from rlhf.loading import load
from rlhf.models import Backbone, ScalarModel
from rlhf_kernels.integrations.transformers import TOLERANCE

SomeModel = TypeVar("SomeModel", bound=Backbone)


def recompute_blocks(model: Backbone) -> None:
    """Keeps only each block's input for the backward pass, which runs the block once more (Chen et al. 2016).

    transformers' own switch does so only in training mode, which turns dropout on as well.
    """
    for block in model.blocks:
        block.forward = partial(_forward, block.forward)


def _forward(forward: Any, *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, **options)


@torch.no_grad()
def freeze(model: SomeModel, dtype: torch.dtype = torch.float32) -> SomeModel:
    """A model that is not trained: without gradients, its weights in ``dtype``. The head of a scalar model stays.

    transformers casts the weights, since it knows those that a type wants in float32 and the buffers it computes.

    Raises:
        ModelError: hidden states differ from those before by more than rounding.
    """
    model.requires_grad_(False)
    if dtype == torch.float32:
        return model
    change = f"weights in {str(dtype).removeprefix('torch.')}"
    with probe.same_hidden_states(model, TOLERANCE[dtype], change, "leave frozen_dtype at float32"):
        whole = model.model
        model.model = load(
            type(whole), whole, whole.config, whole.config._attn_implementation, model.device, dtype=dtype
        ).requires_grad_(False)
        model.model.train(whole.training)
        if isinstance(model, ScalarModel):
            model.model.set_submodule(model.head_name, whole.get_submodule(model.head_name))
    return model
