"""Attention among packed sequences by torch's own ``varlen_attn``, which takes their boundaries and no mask.

transformers asks two functions of an attention implementation: one makes a mask, once in a forward pass for each kind
of layer; the other runs in every layer. Here the first returns boundaries (:class:`Boundaries`), so that the layers
neither look for them nor wait for the device. It finds them by asking the mask that others would make whether a token
sees the one before it. So windows, chunks and positions mean here what they mean to SDPA.

Where rows are padded or there is a cache, the mask is SDPA's, and so is the attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.settings import ConfigError

NAME = "varlen_attn"
"""The implementation's name in transformers. It has no "flash" in it, by which transformers knows flash-attn's."""
DEVICE = "cuda"
"""The kind of device that has the kernel."""
OTHER_SCORES = {"softcap": "caps its scores", "s_aux": "has sinks", "position_bias": "adds a bias to its scores"}
"""What attention may do beside softmax(q · k) · v, by the argument in which transformers hands it over."""
LARGEST_HEAD = 256
GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""For keys and values of fewer heads. torch 2.11 takes these without being told."""


@dataclass(frozen=True)
class Boundaries:
    """Where the sequences of a batch begin, its rows laid end to end."""

    starts: Tensor
    """(S + 1,) int32, with the end of the last one."""
    longest: int
    """Tokens of the longest."""
    window: int | None
    """How many tokens each sees, itself included; None: all before it."""


def check(config: Any, device: torch.device | str) -> None:
    """Raises if a model of this configuration can't run so on the device.

    Raises:
        ConfigError: says why.
    """
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        refuse(f"needs torch 2.11, and this is {torch.__version__}")
    if torch.device(device).type != DEVICE:
        refuse(f"runs on an NVIDIA GPU, and this run is on {torch.device(device).type}")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind and not (kind._supports_sdpa and kind._supports_flash_attn and kind._can_set_attn_implementation()):
        refuse(f"does not fit the attention of {config.model_type} models")


def refuse(why: str) -> NoReturn:
    """Raises, with what varlen_attn does or can't do."""
    raise ConfigError(f"attention: varlen_attn {why}; leave it out, or take another implementation")


def boundaries_or_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Boundaries | Tensor | None:
    """What transformers hands to every layer in place of a mask."""
    if attention_mask is not None or q_length != kv_length or use_vmap:
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap, device=device, **options,
        )  # fmt: skip
    rows, later = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)[None]
    first = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    first[:, 1:] = ~mask_function(rows, torch.zeros_like(rows), later, later - 1)
    end = torch.tensor([first.numel()], device=device)
    starts = torch.cat([first.flatten().nonzero()[:, 0], end]).int()
    return Boundaries(starts, int(starts.diff().max()), local_size)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Boundaries | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(B, T, H, D) of a layer, from its (B, H, T, D) query and the key and value, which may have fewer heads."""
    for name, what in OTHER_SCORES.items():
        if options.get(name) is not None:
            refuse(f"has no way for attention that {what} ({name})")
    if not isinstance(attention_mask, Boundaries):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
    if dropout:
        refuse(f"has no dropout, and this model's is {dropout:g}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        refuse("is only for attention that sees nothing of what follows")
    size = query.shape[-1]
    if size % 8 or size > LARGEST_HEAD or value.shape[-1] != size:
        refuse(
            f"takes heads of a multiple of 8 up to {LARGEST_HEAD}, for queries and values alike, "
            f"and this model's are of {size} and {value.shape[-1]}"
        )
    # Rotary embeddings in float32 leave queries and keys in it. Autocast knows SDPA, but not this function.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = (states.transpose(1, 2).to(dtype) for states in (query, key, value))
    found: Any = varlen_attn(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        attention_mask.starts,
        attention_mask.starts,
        attention_mask.longest,
        attention_mask.longest,
        scale=scaling,
        # How many it sees on its left, itself not counted, and on its right.
        window_size=(-1 if attention_mask.window is None else attention_mask.window - 1, 0),
        **GROUPED,
    )
    return found.unflatten(0, (len(query), -1)), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, boundaries_or_mask)
