"""Grows sequences a token at a time, for sampling and for the check of a model when it is loaded.

How the past is kept depends on the model (:mod:`rlhf.probe` finds out which way is right for it):

* ``padded``: prompts of any lengths in one batch, padded on the left, with a cache of keys, values and states;
* ``aligned``: a cache too, for prompts of one length, because padding would leak into the model's state;
* ``whole``: no cache. Every sequence goes through the model again for every token, which is slow but right.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf_kernels.integrations.transformers import in_place_of

if TYPE_CHECKING:
    from rlhf.models import LanguageModel

Decoding: TypeAlias = Literal["padded", "aligned", "whole"]


# Up to so many rows, a BLAS on a CPU takes a third to a half of the time for weight · statesᵀ as for states · weightᵀ.
FEW_ROWS = 48


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``. Of few rows on a CPU the result lies in columns."""
    if not states.is_cpu or states.shape[:-1].numel() > FEW_ROWS:
        return F.linear(states, weight, bias)
    product = (weight @ states.reshape(-1, states.shape[-1]).T).T
    if bias is not None:
        product = product + bias.to(product.dtype)  # autocast multiplies in another dtype
    return product.reshape(*states.shape[:-1], len(weight))


@contextlib.contextmanager
def decoding_layers(module: nn.Module) -> Iterator[None]:
    """Has a model's linear layers on a CPU multiply as :func:`linear` does: what is decoded is few rows at a time.

    A layer whose ``forward`` others have replaced is left as it is.
    """
    layers = [
        layer
        for layer in module.modules()
        if type(layer) is nn.Linear and layer.weight.is_cpu and "forward" not in vars(layer)
    ]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(in_place_of(layer, partial(_forward, layer)))
        yield


def _forward(layer: nn.Linear, states: Tensor) -> Tensor:
    return linear(states, layer.weight, layer.bias).contiguous()  # attention wants rows


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in memory that has room for more: torch.cat would copy the past for every token."""

    rooms: dict[str, Tensor]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begins with nothing."""
        super().lazy_initialization(key_states, value_states)
        self.rooms = {}

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends (rows, heads, new tokens, D) states, and returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._appended("keys", key_states), self._appended("values", value_states)
        return self.keys, self.values

    def _appended(self, name: str, new: Tensor) -> Tensor:
        past: Tensor = getattr(self, name)
        length = past.shape[-2] if past.numel() else 0
        end = length + new.shape[-2]
        room = self.rooms.get(name)
        # Where rows were taken out, the past lies elsewhere.
        if room is None or room.data_ptr() != past.data_ptr() or room.shape[-2] < end:
            room = new.new_empty(*new.shape[:-2], end + max(end // 2, 16), new.shape[-1])
            if length:
                room[..., :length, :] = past
            self.rooms[name] = room
        room[..., length:end, :] = new
        return room[..., :end, :]


def make_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def cache_argument(module: Any) -> str:
    """The argument that takes a module's cache: transformers has renamed it, models with code of their own have not."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


class Decoder:
    """A batch of sequences that grow together. :meth:`keep` takes out the rows that are done."""

    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]], decoding: Decoding):
        self.model = model
        self.decoding = decoding
        if decoding == "whole":
            self.sequences = [list(prompt) for prompt in prompts]
            return
        inner, device = model.inner, model.device
        # A prompt that several rows begin with goes through the model once.
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.rows: Tensor | None = None
        if len(places) < len(prompts):
            self.rows = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
            prompts = list(places)
        width = max(map(len, prompts))
        # Padding is on the left, so that all prompts end in the same column. Its token does not matter: it is masked.
        self.ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache = make_cache(model.model.config)
        names = inspect.signature(inner.forward).parameters
        self.cache_name = cache_argument(inner)
        self.takes_positions = "position_ids" in names

    def logits(self) -> Tensor:
        """(rows, V) logits of the token that follows each sequence."""
        if self.decoding == "whole":
            return self.model.next_logits(self.sequences)
        options: dict[str, Any] = {self.cache_name: self.cache}
        if self.takes_positions:
            options["position_ids"] = self.positions
        if self.decoding == "padded":
            options["attention_mask"] = self.mask
        states = self.model.inner(input_ids=self.ids, use_cache=True, **options).last_hidden_state
        logits = self.model.project(states[:, -1])
        if self.rows is not None:
            logits = logits[self.rows]
            self.keep(self.rows)
            self.rows = None
        return logits

    def append(self, tokens: Tensor) -> None:
        """Adds a token, (rows,) int64, to every sequence."""
        if self.decoding == "whole":
            for sequence, token in zip(self.sequences, tokens.tolist(), strict=True):
                sequence.append(token)
            return
        self.ids = tokens[:, None]
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, rows: Any) -> None:
        """Keeps only the rows numbered in ``rows``, (kept,) int64."""
        if self.decoding == "whole":
            self.sequences = [self.sequences[row] for row in rows.tolist()]
            return
        self.cache.reorder_cache(rows)  # every kind of cache layer has this method, and it can drop rows too
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
