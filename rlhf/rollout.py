"""Sampling from a policy, keeping the log-prob of every sampled token.

PPO needs log π_old(token): it is at hand when the token is drawn, so it is kept, and the old policy is never run
again over its own samples. Completions that have ended leave the batch, so none of them costs a step more.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.models import LanguageModel, unwrap
from rlhf_kernels import selective_log_softmax


@dataclass(frozen=True)
class Completion:
    """What was sampled after one prompt."""

    tokens: list[int]
    """With the end-of-sequence token, unless the limit cut it off."""
    logprobs: Tensor
    """(len(tokens),) float32, on the CPU: log π(token) at the sampling temperature."""


def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 512,
) -> list[Completion]:
    """One completion for every prompt, in their order. Draws from torch's global generator.

    Prompts of like length are sampled together, so that little of a batch is padding. Temperature 0 takes the
    likeliest token (its log-probs are those at temperature 1).
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        sampled = sample_batch(model, [prompts[i] for i in members], eos_token_id, max_new_tokens, temperature)
        completions.update(zip(members, sampled, strict=True))
    return [completions[i] for i in range(len(prompts))]


@torch.no_grad()
def sample_batch(
    model: LanguageModel, prompts: list[Sequence[int]], eos_token_id: int, max_new_tokens: int, temperature: float
) -> list[Completion]:
    """One batch: prefill over left-padded prompts, then a token at a time."""
    inner = unwrap(model).model
    was_training = inner.training
    inner.eval()
    device, width = inner.device, max(map(len, prompts))
    # The padding's token does not matter (the mask hides it); left, so that all prompts end at the same column.
    ids = torch.tensor([[eos_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    rows = torch.arange(len(prompts), device=device)  # which completion each row of the batch is
    tokens = torch.full((len(prompts), max_new_tokens), eos_token_id, device=device)
    logprobs = torch.zeros(len(prompts), max_new_tokens, device=device)
    count = torch.full((len(prompts),), max_new_tokens, device=device)
    cache = DynamicCache(config=inner.config)
    # transformers had it as past_key_values, and models that bring their own code still do.
    cache_name = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
    for step in range(max_new_tokens):
        logits = inner(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: cache},
        ).logits[:, -1]
        if temperature == 0:
            drawn = logits.argmax(-1)
        else:
            drawn = torch.multinomial((logits.float() / temperature).softmax(-1), 1).squeeze(1)
        tokens[rows, step] = drawn
        logprobs[rows, step] = selective_log_softmax(logits, drawn, temperature=temperature or 1.0)

        ended = drawn == eos_token_id
        count[rows[ended]] = step + 1
        going = (~ended).nonzero().squeeze(1)
        if len(going) == 0 or step + 1 == max_new_tokens:
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
            rows, drawn, mask, positions = rows[going], drawn[going], mask[going], positions[going]
        ids = drawn[:, None]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
    inner.train(was_training)
    return [
        Completion(tokens=row[:n].tolist(), logprobs=row_logprobs[:n].clone())
        for row, row_logprobs, n in zip(tokens.cpu(), logprobs.cpu(), count.tolist(), strict=True)
    ]
