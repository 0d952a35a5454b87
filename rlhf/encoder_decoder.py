"""Encoder–decoder models (T5, and FLAN-T5 and T0 made of it), which the paper compares with (appendix C.5).

They are only sampled from, by transformers' ``generate``: the prompt is what the encoder reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from rlhf.data import Limits, PromptExample, PromptRecord
from rlhf.fields import DataError, field_error
from rlhf.loading import ModelSource, load, load_config


class EncoderDecoder:
    """A model with an encoder for the prompt and a decoder for the completion."""

    def __init__(self, model: Any):
        self.model = model

    @classmethod
    def load(cls, source: ModelSource, device: torch.device | str) -> EncoderDecoder:
        """Reads the model, in float32."""
        return cls(load(AutoModelForSeq2SeqLM, source, load_config(source), None, device).eval())

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[list[int]],
        streams: Sequence[int],
        *,
        pad: int,
        max_new_tokens: int,
        temperature: float,
        batch_size: int,
        seed: int,
    ) -> list[list[int]]:
        """A completion for every prompt, as token ids, drawn with the seed and the numbers of those in its batch."""
        found: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            length = max(len(prompts[i]) for i in members)
            ids = torch.tensor([prompts[i] + [pad] * (length - len(prompts[i])) for i in members])
            mask = torch.tensor([[1] * len(prompts[i]) + [0] * (length - len(prompts[i])) for i in members])
            devices = [self.model.device] if self.model.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(hash((seed, *(streams[i] for i in members))) % 2**63)
                options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                sampled = self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    max_new_tokens=max_new_tokens,
                    **(options if temperature else {"do_sample": False}),
                )
            for i, row in zip(members, sampled.tolist(), strict=True):
                found[i] = cut(row[1:], self.ends, pad)  # the first token is the decoder's start
        return [found[i] for i in range(len(prompts))]

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a completion."""
        named = self.model.generation_config.eos_token_id
        return frozenset(named if isinstance(named, list) else [named])


def cut(tokens: list[int], ends: frozenset[int], pad: int) -> list[int]:
    """A row of generated tokens without what follows its end."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    while tokens and tokens[-1] == pad:
        tokens = tokens[:-1]
    return tokens


def encode_prompts(
    records: Sequence[PromptRecord], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[PromptExample]:
    """The prompts as the encoder reads them, with the tokens that end a text, within the limit on their length."""
    kept = []
    for record in records:
        text = record.prompt
        if not isinstance(text, str):
            if len(text) > 1 or text[0]["role"] != "user":
                reason = f"is a conversation, which {type(tokenizer).__name__} has no way to write"
                raise field_error(record.where, record.fields[0], reason)
            text = text[0]["content"]
        ids = tokenizer(text).input_ids
        if len(ids) <= limits.max_prompt_tokens:
            kept.append(PromptExample(ids, record.prompt, record.extra))
    if not kept:
        raise DataError(f"no data is left to use: all prompts have over {limits.max_prompt_tokens} tokens")
    return kept
