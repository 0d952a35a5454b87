"""Tests of what the trainer takes for granted about a model. They run on the model itself when it is loaded.

Three things are tested, each on a few random tokens, in milliseconds on the device where the model will run:

* its logits are its last hidden states times its output embeddings (:func:`projection_error`);
* sequences laid out in a batch do not see each other, nor do the responses that share a prompt (:func:`layout_error`);
* a cache gives the logits that a whole pass gives (:func:`decoding_error`).

Each function returns the error relative to the size of what is compared. Rounding in float32 gives about 1e-6. A leak
from one sequence into another gives 3e-4 or more with weights that were never trained, and much more with trained ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from rlhf.batch import Group, Layout, lay_out
from rlhf.decoding import Decoder, Decoding
from rlhf.loading import ModelError, context_length
from rlhf_kernels.integrations.transformers import relative_error

if TYPE_CHECKING:
    from rlhf.models import Backbone, LanguageModel

LONGEST = 12
"""Tokens of the longest sequence tried, if the context has room for as many."""


def probe_sequences(model: Backbone, lengths: tuple[int, ...]) -> list[list[int]]:
    """Random tokens, always the same ones, without those that a configuration gives a meaning (padding, BOS, ...)."""
    config = model.model.config.get_text_config()
    named = [value for name, value in config.to_dict().items() if name.endswith("token_id")]
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    embeddings: Any = model.model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(embeddings.weight), (8 * sum(lengths) + 64,), generator=generator).tolist()
    plain = iter([token for token in drawn if token not in special] or drawn)
    return [[next(plain) for _ in range(length)] for length in lengths]


@contextlib.contextmanager
def same_hidden_states(model: Backbone, tolerance: float, change: str, remedy: str) -> Iterator[None]:
    """For a change inside that must leave a model's hidden states as they are, but for rounding.

    Raises:
        ModelError: they are off by more than ``tolerance``; names the change and the remedy.
    """
    tokens = torch.tensor(probe_sequences(model, (4,)), device=model.device)

    def states() -> torch.Tensor:
        with torch.no_grad(), model.probing():
            return model.inner(tokens, use_cache=False).last_hidden_state.float()

    before = states()
    yield
    error = relative_error(states(), before)
    if not error <= tolerance:
        raise ModelError(
            f"{model.name}: with {change}, its hidden states are off by {error:.2g} of their size; {remedy}"
        )


@torch.no_grad()
def projection_error(model: LanguageModel) -> float:
    """How far the logits are from the last hidden state times the output embeddings, with softcap and scale."""
    ids = torch.tensor(probe_sequences(model, (4,)), device=model.device)
    everything = torch.ones_like(ids)
    states = model.inner(ids, attention_mask=everything, use_cache=False).last_hidden_state
    expected = model.model(ids, attention_mask=everything, use_cache=False).logits.float()
    return relative_error(model.project(states), expected)


@torch.no_grad()
def layout_error(model: Backbone, layout: Layout) -> float:
    """How far hidden states of sequences laid out together are from those of each sequence alone."""
    room = min(LONGEST, context_length(model.model.config))
    # The second and the third share a row, whose last position is unused.
    sequences = probe_sequences(model, (room, room // 2, room // 2 - 1))
    groups = [Group(ids[:1], [ids[1:]]) for ids in sequences]
    if layout == "shared":  # the second prompt has two responses, and shares a row with the third
        prompt = sequences[0][: room // 2]
        groups = [Group(prompt, [sequences[0][room // 2 :], sequences[1]]), groups[2], groups[1]]
    batch = lay_out(groups, layout).to(model.device)
    together = model.hidden(batch, batch.before).split(batch.lengths.tolist())
    alone = [
        model.inner(torch.tensor([[*prompt, *response]], device=model.device), use_cache=False).last_hidden_state[
            0, len(prompt) - 1 : -1
        ]
        for prompt, responses in groups
        for response in responses
    ]
    return max(relative_error(ours.float(), expected.float()) for ours, expected in zip(together, alone, strict=True))


@torch.no_grad()
def decoding_error(model: LanguageModel, decoding: Decoding) -> float:
    """How far the logits after each token of a growing batch are from those of a whole pass over each sequence.

    Two prompts grow by two tokens each. Then the first leaves the batch, and the other goes on growing.
    """
    steps = 5
    longer = min(LONGEST, context_length(model.model.config)) - steps
    prompts = (longer, longer if decoding == "aligned" else max(1, longer - 2))
    sequences = probe_sequences(model, (prompts[0] + steps, prompts[1] + steps))
    grown = [[ids[: n + step] for step in range(steps)] for ids, n in zip(sequences, prompts, strict=True)]
    whole = [model.next_logits(prefixes) for prefixes in grown]
    decoder = Decoder(model, [prefixes[0] for prefixes in grown], decoding)
    rows, worst = [0, 1], 0.0
    for step in range(steps):
        logits = decoder.logits().float()
        for row, ours in zip(rows, logits, strict=True):
            expected = whole[row][step]
            # Centred, since a constant that is added to every logit of a row changes no probability.
            worst = max(worst, relative_error(ours - ours.mean(), expected - expected.mean()))
        if step == 2:
            rows = [1]
            decoder.keep(torch.tensor(rows, device=model.device))
        decoder.append(torch.tensor([sequences[row][prompts[row] + step] for row in rows], device=model.device))
    return worst
