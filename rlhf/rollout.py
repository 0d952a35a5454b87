"""Sampling from a policy, keeping the log-prob of every sampled token.

PPO needs log π_old(token). It is known when the token is drawn, so it is kept then, and the old policy never runs
again over its own samples. Completions that have ended leave the batch, so that they cost no further steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.decoding import Decoder
from rlhf.models import LanguageModel, unwrap
from rlhf_kernels import selective_log_softmax


@dataclass(frozen=True)
class Completion:
    """What was sampled after one prompt."""

    tokens: list[int]
    """With the token that ended it, unless the limit cut it off."""
    logprobs: Tensor
    """(len(tokens),) float32, on the CPU: log π(token) at the sampling temperature."""


class NotFiniteError(ArithmeticError):
    """The model's logits are NaN or infinite, so no next token can be drawn."""


def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 512,
) -> list[Completion]:
    """One completion for every prompt, in their order. Draws from torch's global generator.

    Prompts of similar length are sampled together, so that little of a batch is padding. Temperature 0 takes the
    likeliest token; the log-probs are then those at temperature 1.

    Raises:
        NotFiniteError: the model's logits are NaN or infinite.
    """
    completions: dict[int, Completion] = {}
    for members in sampling_batches(unwrap(model), prompts, batch_size):
        sampled = sample_batch(model, [prompts[i] for i in members], end_token_ids, max_new_tokens, temperature)
        completions.update(zip(members, sampled, strict=True))
    return [completions[i] for i in range(len(prompts))]


def sampling_batches(model: LanguageModel, prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of prompts to sample together. Their lengths are similar, or equal if the model needs that."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    members: list[int] = []
    for i in order:
        other_length = members and len(prompts[members[0]]) != len(prompts[i]) and model.decoding == "aligned"
        if len(members) == size or other_length:
            yield members
            members = []
        members.append(i)
    if members:
        yield members


@torch.no_grad()
def sample_batch(
    model: LanguageModel,
    prompts: list[Sequence[int]],
    end_token_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
) -> list[Completion]:
    """One batch: prefill over the prompts, then a token at a time."""
    module = unwrap(model)
    was_training = module.training
    module.eval()
    device = module.device
    ends = torch.tensor(sorted(end_token_ids), device=device)

    rows = torch.arange(len(prompts), device=device)  # which completion each row of the batch is
    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(prompts), max_new_tokens, device=device)
    count = torch.full((len(prompts),), max_new_tokens, device=device)
    decoder = Decoder(module, prompts, module.decoding)
    for step in range(max_new_tokens):
        logits = decoder.logits()
        probabilities = (logits.float() / (temperature or 1.0)).softmax(-1)
        # One NaN makes a whole row NaN. torch.multinomial would raise a traceback, or leave the GPU unusable.
        if probabilities[:, 0].isnan().any():
            raise NotFiniteError("the model's logits are not finite")
        drawn = logits.argmax(-1) if temperature == 0 else torch.multinomial(probabilities, 1).squeeze(1)
        tokens[rows, step] = drawn
        logprobs[rows, step] = selective_log_softmax(logits, drawn, temperature=temperature or 1.0)

        ended = torch.isin(drawn, ends)
        count[rows[ended]] = step + 1
        going = (~ended).nonzero().squeeze(1)
        if len(going) == 0 or step + 1 == max_new_tokens:
            break
        if len(going) < len(rows):
            decoder.keep(going)
            rows, drawn = rows[going], drawn[going]
        decoder.append(drawn)
    module.train(was_training)
    return [
        Completion(tokens=row[:n].tolist(), logprobs=row_logprobs[:n].clone())
        for row, row_logprobs, n in zip(tokens.cpu(), logprobs.cpu(), count.tolist(), strict=True)
    ]
