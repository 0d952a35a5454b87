"""Sampling from a policy, keeping the log-prob of every sampled token.

PPO needs log π_old(token). It is known when the token is drawn, so it is kept then, and the old policy never runs
again over its own samples. Completions that have ended leave the batch, so that they cost no further steps.

Which token is drawn depends on the model's logits, a seed, the number of the completion and the token's place in it,
and on nothing else. So a completion is the same whichever others are sampled beside it, in this process or another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.decoding import Decoder, decoding_layers
from rlhf.models import LanguageModel, unwrap
from rlhf.sharding import Passes
from rlhf_kernels import sample_tokens


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
    seed: int = 0,
    streams: Sequence[int] | None = None,
) -> list[Completion]:
    """One completion for every prompt, in their order.

    ``streams`` has a number for each, such as that of an episode, with which its tokens are drawn; None numbers them
    from 0 on. Prompts of similar length are sampled together, so that little of a batch is padding. Temperature 0 takes
    the likeliest token; the log-probs are then those at temperature 1. All processes that share a sharded model call
    this together.

    Raises:
        NotFiniteError: the model's logits are NaN or infinite.
    """
    streams = range(len(prompts)) if streams is None else streams
    module = unwrap(model)
    completions: dict[int, Completion] = {}
    was_training = module.training
    module.eval()
    try:
        with decoding_layers(module.inner), Passes(module, gathered=True) as passes:
            for members in sampling_batches(module, prompts, batch_size):
                sampler = Sampler(seed, torch.tensor([streams[i] for i in members], device=module.device), temperature)
                decoder = Decoder(module, [prompts[i] for i in members], module.decoding)
                sampled = sample_batch(decoder, passes, end_token_ids, max_new_tokens, sampler)
                completions.update(zip(members, sampled, strict=True))
    finally:
        module.train(was_training)
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


@dataclass(frozen=True)
class Sampler:
    """Draws the tokens of a batch."""

    seed: int
    streams: Tensor
    """(completions,) int64: their numbers."""
    temperature: float

    def draw(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Token number ``step`` of the completions ``rows``, and its log-prob, from a row of logits for each."""
        message = "the model's logits are not finite"
        try:
            tokens, logprobs = sample_tokens(
                logits, seed=self.seed, stream=self.streams[rows], step=step, temperature=self.temperature
            )
        except ValueError as error:  # values are looked at on a CPU
            raise NotFiniteError(message) from error
        if not tokens.is_cpu and (tokens < 0).any():
            raise NotFiniteError(message)
        return tokens, logprobs


@torch.no_grad()
def sample_batch(
    decoder: Decoder, passes: Passes, end_token_ids: Collection[int], max_new_tokens: int, sampler: Sampler
) -> list[Completion]:
    """One batch: prefill over the prompts, then a token at a time."""
    size, device = len(sampler.streams), sampler.streams.device
    ends = torch.tensor(sorted(end_token_ids), device=device)

    rows = torch.arange(size, device=device)  # which completion each row of the batch is
    tokens = torch.zeros(size, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(size, max_new_tokens, device=device)
    count = torch.full((size,), max_new_tokens, device=device)
    for step in range(max_new_tokens):
        drawn, logprobs[rows, step] = sampler.draw(passes(decoder.logits), rows, step)
        tokens[rows, step] = drawn

        ended = torch.isin(drawn, ends)
        count[rows[ended]] = step + 1
        going = (~ended).nonzero().squeeze(1)
        if len(going) == 0 or step + 1 == max_new_tokens:
            break
        if len(going) < len(rows):
            decoder.keep(going)
            rows, drawn = rows[going], drawn[going]
        decoder.append(drawn)
    return [
        Completion(tokens=row[:n].tolist(), logprobs=row_logprobs[:n].clone())
        for row, row_logprobs, n in zip(tokens.cpu(), logprobs.cpu(), count.tolist(), strict=True)
    ]
