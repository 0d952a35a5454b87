"""What PPO maximises: the reward model's score, functions in Python, or a weighted sum of them.

A function gets lists as keyword arguments and returns a number for every completion::

    def polite(prompts, completions, **fields):
        return [float(completion.count("please")) for completion in completions]

``prompts`` are as the records have them (texts or messages), ``completions`` are texts without the token that ended
them, and every further field of the records is a list as well, with None for a record that lacks the field.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.batch import Group
from rlhf.config import PPOConfig
from rlhf.data import PromptExample, PromptRecord, turn_end
from rlhf.encoding import encode_records
from rlhf.fields import type_and_line
from rlhf.functions import load_function
from rlhf.loading import context_length
from rlhf.models import ScalarModel

logger = logging.getLogger(__name__)


class RewardError(ValueError):
    """A function failed, or a reward is no finite number. The message names the reward, and the prompt if it knows."""


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run. PPO itself computes the scores of ``model``, and gives them to :meth:`total`."""

    model: ScalarModel | None
    functions: dict[str, Callable[..., Any]]
    weights: list[float]
    """The model's first, where there is one."""
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: frozenset[int]
    reader: PreTrainedTokenizerBase | None = None
    """The tokenizer of the model, if it is not the policy's: then the model reads the completion's text with it."""

    def groups(self, prompts: Sequence[PromptExample], responses: Sequence[list[int]]) -> list[Group]:
        """Prompts and completions in the tokens of the model's own tokenizer, ``reader``.

        Raises:
            RewardError: a completion is longer than the model's context.
        """
        assert self.reader is not None
        assert self.model is not None
        texts = [decode(self.tokenizer, response, self.end_token_ids) for response in responses]
        ended = [response[-1] in self.end_token_ids for response in responses]
        return read_anew(prompts, texts, ended, self.reader, context_length(self.model.model.config))

    def total(self, scores: Tensor | None, prompts: Sequence[PromptExample], responses: Sequence[list[int]]) -> Tensor:
        """(S,) float32: the weighted sum, given the model's (S,) scores where there is a model.

        Raises:
            RewardError: a reward is NaN, infinite or no number; or a function fails, or does not return exactly one
                number for each completion.
        """
        rewards = [] if scores is None else [check_finite("the reward model", scores, prompts)]
        completions = [decode(self.tokenizer, response, self.end_token_ids) for response in responses]
        for name, function in self.functions.items():
            rewards.append(check_finite(name, call(name, function, prompts, completions), prompts))
        device = rewards[0].device
        return torch.stack([weight * each.to(device) for weight, each in zip(self.weights, rewards, strict=True)]).sum(
            0
        )


def read_anew(
    prompts: Sequence[PromptExample],
    texts: Sequence[str],
    ended: Sequence[bool],
    reader: PreTrainedTokenizerBase,
    limit: int,
) -> list[Group]:
    """Prompts and completions in the tokens of another tokenizer. A completion that was cut off gets no end.

    What is longer than ``limit`` with its prompt is cut off there, and counted in a warning.

    Raises:
        RewardError: a prompt alone is as long as ``limit``.
    """
    records = [PromptRecord(each.text, "", tools=each.extra.get("tools")) for each in prompts]
    groups, cut = [], 0
    for example, has_ended, (prompt, (answer,)) in zip(
        prompts, ended, encode_records(records, [[text] for text in texts], reader), strict=True
    ):
        end = turn_end(reader) if isinstance(example.text, list) else [reader.eos_token_id]
        whole = answer or end
        if not has_ended and whole[-len(end) :] == end:
            whole = whole[: -len(end)] or whole
        if len(prompt) >= limit:
            raise RewardError(
                f"the reward model's tokenizer makes {len(prompt)} tokens of the prompt {shown(example)}, which leaves "
                f"no room for a completion in its context of {limit}"
            )
        cut += len(prompt) + len(whole) > limit
        groups.append(Group(prompt, [whole[: limit - len(prompt)]]))
    if cut:
        logger.warning(
            "the reward model reads %d of %d completions only as far as its context of %d goes", cut, len(texts), limit
        )
    return groups


def make_rewards(
    config: PPOConfig,
    model: ScalarModel | None,
    functions: dict[str, Callable[..., Any]],
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: frozenset[int],
    reader: PreTrainedTokenizerBase | None = None,
) -> Rewards:
    """The rewards of the settings."""
    weights = config.reward_weights or [1.0] * ((model is not None) + len(functions))
    return Rewards(model, functions, weights, tokenizer, end_token_ids, reader)


def load_functions(config: PPOConfig) -> dict[str, Callable[..., Any]]:
    """The functions that ``reward`` names, by name."""
    named: dict[str, Callable[..., Any]] = {}
    for each in cast(list[Any], config.reward):  # PPOConfig has made a list of it
        name = each if isinstance(each, str) else getattr(each, "__name__", type(each).__name__)
        same = sum(known.split(" (")[0] == name for known in named)  # two lambdas, or one function with two weights
        named[f"{name} ({same + 1})" if same else name] = load_function("reward", each)
    return named


def decode(tokenizer: PreTrainedTokenizerBase, response: Sequence[int], end_token_ids: frozenset[int]) -> str:
    """A completion's text, without the token that ended it."""
    tokens = response[:-1] if response and response[-1] in end_token_ids else response
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def call(name: str, function: Callable[..., Any], prompts: Sequence[PromptExample], completions: list[str]) -> Tensor:
    """(S,) float32: what a function returns, each a number."""
    fields = sorted({field for example in prompts for field in example.extra} - {"prompts", "completions"})
    columns = {field: [example.extra.get(field) for example in prompts] for field in fields}
    try:
        returned = function(prompts=[example.text for example in prompts], completions=completions, **columns)
        is_list = isinstance(returned, Iterable) and not isinstance(returned, (str, bytes, Mapping))
        found = list(returned) if is_list else []
    except (Exception, SystemExit) as error:  # the function is the user's: anything may happen in it
        raise RewardError(f"the reward {name} failed: {type_and_line(error)}") from error
    if not is_list:
        raise RewardError(f"the reward {name} returned {returned!r}, must be a list of numbers, one a completion")
    if len(found) != len(completions):
        raise RewardError(f"the reward {name} returned {len(found)} values for {len(completions)} completions")
    return torch.tensor([number(name, value, example) for value, example in zip(found, prompts, strict=True)])


def number(name: str, value: Any, prompt: PromptExample) -> float:
    """The value as a float; bool, NumPy's numbers and tensors with one element will do, and text will not."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name} returned {value!r}, which is no number, for the prompt {shown(prompt)}") from error


def check_finite(name: str, rewards: Tensor, prompts: Sequence[PromptExample]) -> Tensor:
    """The rewards, none of which may be NaN or infinite."""
    for value, prompt in zip(rewards.tolist(), prompts, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"{name} gives {value} for the prompt {shown(prompt)}")
    return rewards.float()


def shown(prompt: PromptExample) -> str:
    """A prompt, short enough for one line."""
    text = prompt.text if isinstance(prompt.text, str) else str(prompt.text[-1]["content"])
    return repr(text if len(text) <= 80 else text[:77] + "...")
