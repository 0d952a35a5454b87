"""Grows sequences a token at a time, for sampling and for the check of a model when it is loaded.

How the past is kept depends on the model (:mod:`rlhf.probe` finds out which way is right for it):

* ``padded``: prompts of any lengths in one batch, padded on the left, with a cache of keys, values and states;
* ``aligned``: a cache too, for prompts of one length, because padding would leak into the model's state;
* ``whole``: no cache. Every sequence goes through the model again for every token, which is slow but right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from rlhf.models import LanguageModel

Decoding: TypeAlias = Literal["padded", "aligned", "whole"]


class Decoder:
    """A batch of sequences that grow together. :meth:`keep` takes out the rows that are done."""

    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]], decoding: Decoding):
        self.model = model
        self.decoding = decoding
        if decoding == "whole":
            self.sequences = [list(prompt) for prompt in prompts]
            return
        inner, width = model.model, max(map(len, prompts))
        # Padding is on the left, so that all prompts end in the same column. Its token does not matter: it is masked.
        self.ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=inner.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=inner.device)
        self.mask = (torch.arange(width, device=inner.device) >= width - lengths[:, None]).long()
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=inner.config)
        names = inspect.signature(inner.forward).parameters
        # transformers has renamed this argument; models with code of their own still call it past_key_values.
        self.cache_name = "cache" if "cache" in names else "past_key_values"
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
        return self.model.model(input_ids=self.ids, use_cache=True, logits_to_keep=1, **options).logits[:, -1]

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
