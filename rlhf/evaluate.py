"""Comparing a model with a baseline (Ouyang et al. 2022, section 4).

* win rate: how often a judge prefers the model's completion to the baseline's, ties counted half (Figure 1);
* reward: the mean score of the completions of both, if the judge is a reward model;
* KL: E_y~model [ log π_model(y|x) − log π_baseline(y|x) ], in nats per completion (Figure 38's axis);
* alignment tax: the rise of the model's loss on pretraining text over the baseline's, in nats per token (section 4.2).

    rlhf evaluate --model runs/ppo/model --baseline runs/sft/model --judge runs/reward/model \\
        --prompts held_out.jsonl --output_dir runs/evaluation
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.batch import Group, groups_of_one
from rlhf.checkpoints import describing
from rlhf.config import EvaluateConfig, GenerateConfig
from rlhf.data import Limits, PromptExample, read_prompts, read_texts, tokenize_prompts, tokenize_texts
from rlhf.fields import type_and_line
from rlhf.functions import load_function
from rlhf.loading import (
    ModelError,
    check_context,
    check_reward_config,
    check_same_tokenizer,
    end_token_ids,
    load_tokenizer,
    name_of,
    shared_context,
)
from rlhf.models import LanguageModel, ScalarModel
from rlhf.objects import described, is_function
from rlhf.processes import Processes
from rlhf.rates import Rate, win_rate
from rlhf.records import ANSWER_FIELDS
from rlhf.reward import score
from rlhf.rewards import RewardError, check_finite, decode, shown
from rlhf.rollout import NotFiniteError, sample
from rlhf.settings import ConfigError
from rlhf.sharding import Passes, place
from rlhf.tables import markdown_table, number
from rlhf.training import console
from rlhf_kernels import linear_cross_entropy, linear_selective_log_softmax

logger = logging.getLogger(__name__)

Judge = Callable[[Any, str, str], float]


def evaluate(config: EvaluateConfig) -> dict:
    """Runs the comparison, writes it to ``config.output_dir`` and returns the figures."""
    processes = Processes(config.device)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    check_same_tokenizer(tokenizer, name_of(config.model), config.baseline)
    sources = [config.model, config.baseline, None if is_python_judge(config.judge) else config.judge]
    prompts = load_prompts(config, tokenizer, sources) if config.prompts else []
    texts = read_texts(config.pretraining_data) if config.pretraining_data else []
    if texts:
        check_context("pretraining_tokens", config.pretraining_tokens, config.model, config.baseline)
    chunks = tokenize_texts(texts, tokenizer, length=config.pretraining_tokens) if texts else None
    reward_model, judge = load_judge(config, tokenizer, processes)
    output = Path(config.output_dir)
    with describing(f"{output}: cannot be used for output"):
        output.mkdir(parents=True, exist_ok=True)

    models = {name: load_model(source, config, processes) for name, source in sides(config)}
    figures: dict = {name: described(getattr(config, name)) for name in ("model", "baseline", "judge", "seed")}
    figures["prompts"] = len(prompts)
    records: list[dict[str, Any]] = [{"prompt": example.text, **further_fields(example)} for example in prompts]
    if prompts:
        ids = [example.prompt_ids for example in prompts]
        samples = {}
        for name, model in models.items():
            ends = end_token_ids(getattr(config, name), tokenizer)
            samples[name] = sample_all(model, ids, ends, config, processes)
            for record, response in zip(records, samples[name], strict=True):
                record[name] = decode(tokenizer, response, ends)
        figures["kl"] = kl_between(models["model"], models["baseline"], ids, samples["model"], config, processes)
        if reward_model:
            scores = rewards_of(reward_model, ids, samples, config.tokens_per_forward, processes)
            for name, values in scores.items():
                check_judged(f"judge: the score of the {name}'s completion", values, prompts)
            figures["reward"] = {name: values.mean().item() for name, values in scores.items()}
            outcomes = [
                0.5 + 0.5 * math.copysign(a != b, a - b)
                for a, b in zip(*map(torch.Tensor.tolist, scores.values()), strict=True)
            ]
        elif judge:
            share = processes.share(list(zip(prompts, records, strict=True)))
            outcomes = processes.joined(
                [judged(judge, example, record["model"], record["baseline"]) for example, record in share]
            )
        if judge or reward_model:
            figures["win_rate"] = asdict(win_rate(outcomes))
            for record, outcome in zip(records, outcomes, strict=True):
                record["outcome"] = outcome
    if chunks is not None:
        losses = {
            name: pretraining_loss(model, chunks, config.tokens_per_forward, processes)
            for name, model in models.items()
        }
        figures["pretraining_loss"] = losses
        figures["alignment_tax"] = losses["model"] - losses["baseline"]
    check_figures(figures)
    if not processes.is_main:
        return figures

    with describing(f"{output}: results could not be written"):
        (output / "completions.jsonl").write_text("".join(map(as_line, records)))
        (output / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
        (output / "report.md").write_text(describe(figures))
    console.print(f"evaluate: [bold]{output / 'report.md'}[/]")
    return figures


def check_judged(what: str, scores: torch.Tensor, prompts: list[PromptExample]) -> None:
    """Raises if a score is not finite: a NaN would count as a win."""
    try:
        check_finite(what, scores, prompts)
    except RewardError as error:
        raise ModelError(str(error)) from error


def judged(judge: Judge, prompt: PromptExample, a: str, b: str) -> float:
    """What a judge in Python returns for two completions. Raises unless it is a number from 0 to 1."""
    try:
        found = judge(prompt.text, a, b)
    except Exception as error:  # the function is the user's: anything may happen in it
        raise ConfigError(f"judge: failed at the prompt {shown(prompt)}: {type_and_line(error)}") from error
    try:
        outcome = float(found)
    except (TypeError, ValueError):
        outcome = math.nan
    if not 0 <= outcome <= 1:
        raise ConfigError(f"judge: returned {found!r} for the prompt {shown(prompt)}, must be a number from 0 to 1")
    return outcome


def check_figures(figures: Mapping[str, Any], name: str = "") -> None:
    """Raises if a figure is NaN or infinite, so that no such result is written."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            check_figures(value, f"{name}{key} of the ")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{name}{key}: is {value}; are the models' logits finite?".replace("_", " "))


def sides(config: EvaluateConfig) -> list[tuple[str, Any]]:
    """The two models that are compared, each with the name that its figures have."""
    return [("model", config.model), ("baseline", config.baseline)]


def load_prompts(
    config: EvaluateConfig | GenerateConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Any]
) -> list[PromptExample]:
    """Prompts as token ids, with their text. Each leaves room for an answer in the context of all models."""
    limits = Limits(**asdict(config.lengths), context_length=shared_context(*sources))
    return tokenize_prompts(read_prompts(config.prompts), tokenizer, limits)


def is_python_judge(judge: Any) -> bool:
    """Whether a judge is a Python function, or the name of one, and not a reward model."""
    if isinstance(judge, str):
        return ":" in judge and not Path(judge).exists()
    return is_function(judge)


def load_model(source: Any, config: EvaluateConfig | GenerateConfig, processes: Processes) -> LanguageModel:
    """A model to sample from, whole in every process or split over them."""
    return place(LanguageModel.load(source, device=processes.device).eval(), config.sharding, processes)


def load_judge(
    config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> tuple[ScalarModel | None, Judge | None]:
    """The reward model or the Python function that ``config.judge`` names."""
    judge: Any = config.judge
    if judge is None:
        return None, None
    if is_python_judge(judge):
        return None, load_function("judge", judge)
    check_reward_config(judge)
    check_same_tokenizer(tokenizer, name_of(config.model), judge)
    return place(ScalarModel.load(judge, device=processes.device).eval(), config.sharding, processes), None


def sample_all(
    model: LanguageModel,
    ids: list[list[int]],
    ends: frozenset[int],
    config: EvaluateConfig | GenerateConfig,
    processes: Processes,
) -> list[list[int]]:
    """One completion per prompt, as token ids. Each process samples its share."""
    try:
        completions = sample(
            model,
            processes.share(ids),
            end_token_ids=ends,
            max_new_tokens=config.lengths.max_response_tokens,
            temperature=config.temperature,
            batch_size=config.batch_size,
            seed=config.seed,
            streams=processes.share(range(len(ids))),
        )
    except NotFiniteError as error:
        raise ModelError(f"{model.name}: {error}; was its training run stopped at a NaN?") from error
    return processes.joined([completion.tokens for completion in completions])


def rewards_of(
    reward_model: ScalarModel,
    prompts: list[list[int]],
    samples: Mapping[str, list[list[int]]],
    tokens_per_forward: int,
    processes: Processes,
) -> dict[str, torch.Tensor]:
    """The score of every model's completion of every prompt. Those of a prompt share it; equal ones tie exactly."""
    answers = list(zip(*samples.values(), strict=True))
    groups = [
        Group(prompt, list(dict.fromkeys(map(tuple, each)))) for prompt, each in zip(prompts, answers, strict=True)
    ]
    share = processes.share(groups)
    scores = score(reward_model, share, tokens_per_forward).cpu().split([len(group.responses) for group in share])
    found = [
        [scores[group.responses.index(tuple(answer))] for answer in each]
        for group, each, scores in zip(groups, answers, processes.joined(scores), strict=True)
    ]
    return {name: torch.stack(values) for name, values in zip(samples, zip(*found, strict=True), strict=True)}


@torch.no_grad()
def kl_between(
    model: LanguageModel,
    baseline: LanguageModel,
    prompts: list[list[int]],
    responses: list[list[int]],
    config: EvaluateConfig,
    processes: Processes,
) -> float:
    """Mean over the model's own completions of log π_model − log π_baseline, in nats per completion."""
    difference = 0.0
    groups = processes.share(groups_of_one(prompts, responses))
    for sign, each in ((1, model), (-1, baseline)):
        op = partial(each.forward, op=linear_selective_log_softmax, temperature=config.temperature)
        with Passes(each) as passes:
            for batch in each.batches(groups, config.tokens_per_forward):
                difference += sign * passes(op, batch).double().sum().item()
    return sum(processes.joined([difference])) / len(prompts)


@torch.no_grad()
def pretraining_loss(
    model: LanguageModel, chunks: torch.Tensor, tokens_per_forward: int, processes: Processes
) -> float:
    """Mean loss per token on (chunks, length) pretraining text, in nats. A chunk's first token is not predicted."""
    loss = 0.0
    op = partial(model.forward, op=linear_cross_entropy, reduction="sum")
    groups = processes.share([Group(row[:1], [row[1:]]) for row in chunks.tolist()])
    with Passes(model) as passes:
        for batch in model.batches(groups, tokens_per_forward):
            loss += passes(op, batch).item()
    return sum(processes.joined([loss])) / (chunks.shape[0] * (chunks.shape[1] - 1))


def generate(config: GenerateConfig) -> Path:
    """Writes ``config.samples`` completions of every prompt to ``completions.jsonl``, and returns its path."""
    processes = Processes(config.device)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    prompts = load_prompts(config, tokenizer, [config.model])
    output = Path(config.output_dir) / "completions.jsonl"
    if output.exists():
        raise ConfigError(f"output_dir: {output} exists; choose another directory, or remove it first")
    model = load_model(config.model, config, processes)
    ends = end_token_ids(config.model, tokenizer)
    repeated = [example.prompt_ids for example in prompts for _ in range(config.samples)]
    responses = [decode(tokenizer, ids, ends) for ids in sample_all(model, repeated, ends, config, processes)]
    if not processes.is_main:
        return output
    if empty := sum(not text.strip() for text in responses):
        logger.warning("%d of %d completions are empty", empty, len(responses))
    temporary = output.with_name(output.name + ".tmp")
    with describing(f"{output}: could not be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            for i, example in enumerate(prompts):
                completions = responses[i * config.samples : (i + 1) * config.samples]
                file.write(as_line({"prompt": example.text, "completions": completions, **further_fields(example)}))
        temporary.rename(output)
    console.print(f"generate: {len(prompts)} prompts × {config.samples} completions in [bold]{output}[/]")
    return output


def further_fields(example: PromptExample) -> dict[str, Any]:
    """The fields of a record besides its prompt, ``tools`` for instance, but without the answers of other models."""
    return {name: value for name, value in example.extra.items() if name not in ANSWER_FIELDS}


def as_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON. Dates and the like, which tables may hold, become text."""
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def describe(figures: dict) -> str:
    """The figures as a page of Markdown."""
    rows = [["prompts", number(figures["prompts"])]]
    if "win_rate" in figures:
        rows.append([f"win rate over the baseline, judged by {figures['judge']}", str(Rate(**figures["win_rate"]))])
    if "reward" in figures:
        rows += [[f"mean reward of the {name}", number(value)] for name, value in figures["reward"].items()]
    if "kl" in figures:
        rows.append(["KL to the baseline (nats per completion)", number(figures["kl"])])
    if "alignment_tax" in figures:
        rows += [
            [f"pretraining loss of the {name}", number(value)] for name, value in figures["pretraining_loss"].items()
        ]
        rows.append(["alignment tax (nats per token)", number(figures["alignment_tax"])])
    title = f"# {figures['model']} against {figures['baseline']}"
    return "\n".join(
        [title, "", markdown_table(["", ""], rows), "", "Every completion judged: `completions.jsonl`.", ""]
    )


__all__ = ["ModelError", "Rate", "evaluate", "generate", "win_rate"]
