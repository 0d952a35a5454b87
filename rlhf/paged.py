"""Sampling by transformers' continuous batching: a paged cache, CUDA graphs, and new prompts as soon as others end.

It draws with torch's generator, in an order that depends on what is sampled beside it. So completions are not the same
bits on another number of processes, nor after ``--resume``; the loop of :mod:`rlhf.rollout` is there for that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from rlhf import varlen
from rlhf.fields import first_line
from rlhf.loading import ModelError
from rlhf.models import LanguageModel, unwrap
from rlhf.rollout import Completion, NotFiniteError
from rlhf.settings import ConfigError

# Older releases of transformers have none.
ContinuousBatchingConfig: Any = getattr(transformers, "ContinuousBatchingConfig", None)

PAGE = 16
"""Tokens of a page on a CPU. On a GPU it is 256, which flash-attn wants, and of which short completions use little."""


def check_paged() -> None:
    """Raises if transformers can't sample so and say with which probability.

    Raises:
        ConfigError: names the release that can.
    """
    if ContinuousBatchingConfig is None or "return_logprobs" not in ContinuousBatchingConfig.__dataclass_fields__:
        raise ConfigError("rollout: is 'paged', for which a newer transformers is needed (5.24 has it)")


@torch.no_grad()
def sample_paged(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> list[Completion]:
    """One completion for every prompt, in their order, of which ``batch_size`` at most are sampled at a time.

    Raises:
        ModelError: transformers can't batch this model so; says why.
        NotFiniteError: the model's logits are NaN or infinite.
    """
    module: LanguageModel = unwrap(model)
    page = PAGE if module.device.type == "cpu" else 256
    pages = -(-(max(map(len, prompts)) + max_new_tokens) // page) + 1
    together = min(batch_size, len(prompts))
    batching = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=pages * together,
        max_requests_per_batch=together,
        return_logprobs=True,
        seed=seed % 2**63,
    )
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(end_token_ids),
        pad_token_id=min(end_token_ids),
    )
    attention = module.model.config._attn_implementation
    model_of_theirs: Any = module.model
    try:
        if attention == varlen.NAME:  # it knows no pages
            model_of_theirs.set_attn_implementation("sdpa")
        with in_16_bits(module.model):
            found = model_of_theirs.generate_batch(
                [list(prompt) for prompt in prompts],
                generation_config=generation,
                continuous_batching_config=batching,
            )
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"{module.name}: can't be sampled with rollout=paged: {first_line(error)}") from error
    finally:
        if module.model.config._attn_implementation != attention:
            model_of_theirs.set_attn_implementation(attention)
    outputs = list(found.values())
    failed = [output.error for output in outputs if output.error]
    if any("probability tensor" in error for error in failed):
        raise NotFiniteError("the model's logits are not finite")
    if failed or len(outputs) != len(prompts):
        reason = failed[0] if failed else f"only {len(outputs)} of {len(prompts)} prompts came back"
        raise ModelError(f"{module.name}: can't be sampled with rollout=paged: {reason}")
    return [Completion(output.generated_tokens, torch.tensor(output.logprobs)) for output in outputs]


@contextmanager
def in_16_bits(model: Any) -> Iterator[None]:
    """Under autocast, a model whose weights are in its precision: keys and values are kept in that of the weights."""
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    kept = [(p, p.data) for p in model.parameters() if dtype and p.is_floating_point()]
    try:
        for parameter, data in kept:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
