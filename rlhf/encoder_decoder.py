"""Encoder–decoder models (T5, and FLAN-T5 and T0 made of it), which the paper compares with (appendix C.5).

They are only sampled from: the prompt is what the encoder reads, and a token is drawn as it is from causal models, so a
completion does not depend on those beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data import PromptExample, PromptRecord
from rlhf.decoding import cache_argument
from rlhf.fields import DataError, field_error
from rlhf.loading import ModelError, ModelSource, load, load_config
from rlhf.rollout import Sampler

logger = logging.getLogger(__name__)


class EncoderDecoder:
    """A model with an encoder for the prompt and a decoder for the completion."""

    def __init__(self, model: Any, name: str):
        self.model = model
        start = model.config.decoder_start_token_id
        if start is None:
            raise ModelError(f"{name}: its configuration has no decoder_start_token_id, so no completion can begin")
        self.start: int = start
        self.cache_name = cache_argument(model)

    @classmethod
    def load(cls, source: ModelSource, name: str, device: torch.device | str) -> EncoderDecoder:
        """Reads the model, in float32."""
        auto = type(source) if isinstance(source, PreTrainedModel) else AutoModelForSeq2SeqLM
        return cls(load(auto, source, load_config(source), None, device).eval(), name)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        streams: Sequence[int],
        end_token_ids: Collection[int],
        max_new_tokens: int,
        temperature: float,
        batch_size: int,
        seed: int,
    ) -> list[list[int]]:
        """A completion for every prompt, as token ids. ``streams`` has a number for each, which its draws depend on.

        Raises:
            NotFiniteError: the model's logits are NaN or infinite.
        """
        found: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            sampler = Sampler(seed, torch.tensor([streams[i] for i in members], device=self.model.device), temperature)
            rows = self._sample_batch([prompts[i] for i in members], sampler, end_token_ids, max_new_tokens)
            found.update(zip(members, rows, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _sample_batch(
        self, prompts: list[list[int]], sampler: Sampler, end_token_ids: Collection[int], max_new_tokens: int
    ) -> list[list[int]]:
        device, length = self.model.device, max(map(len, prompts))
        # The token of padding does not matter: it is masked.
        ids = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(length, device=device) < lengths[:, None]).long()
        encoded = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        rows = torch.arange(len(prompts), device=device)
        ends = torch.tensor(sorted(end_token_ids), device=device)
        drawn = torch.full_like(rows, self.start)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        columns, cache = [], None
        for step in range(max_new_tokens):
            out = self.model(
                encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=drawn[:, None], use_cache=True,
                **{self.cache_name: cache},
            )  # fmt: skip
            cache = out.past_key_values
            drawn, _ = sampler.draw(out.logits[:, -1].float(), rows, step)
            columns.append(drawn)
            ended |= torch.isin(drawn, ends)
            if ended.all():
                break
        return [until_end(row, end_token_ids) for row in torch.stack(columns, 1).tolist()]


def until_end(tokens: list[int], end_token_ids: Collection[int]) -> list[int]:
    """A row of tokens up to the first that ends it."""
    at = next((i for i, token in enumerate(tokens) if token in end_token_ids), len(tokens))
    return tokens[: at + 1]


def encode_prompts(
    records: Sequence[PromptRecord],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    prefix: str = "",
) -> list[PromptExample]:
    """The prompts as the encoder reads them, with the tokens that end a text.

    Those over ``max_prompt_tokens`` without the prefix are left out, with a count.
    """
    kept = []
    for record in records:
        text = record.prompt
        if not isinstance(text, str):
            if len(text) > 1 or text[0]["role"] != "user":
                reason = f"is a conversation, which {type(tokenizer).__name__} has no way to write"
                raise field_error(record.where, record.fields[0], reason)
            text = text[0]["content"]
        if len(tokenizer(text).input_ids) <= max_prompt_tokens:
            kept.append(PromptExample(tokenizer(prefix + text).input_ids, record.prompt, record.extra))
    dropped = f"dropped {len(records) - len(kept)} of {len(records)} prompts: over {max_prompt_tokens} tokens"
    if not kept:
        raise DataError(f"no data is left to use: {dropped}")
    if len(kept) < len(records):
        logger.warning(dropped)
    return kept
