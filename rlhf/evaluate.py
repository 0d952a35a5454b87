"""Comparing models with a baseline (Ouyang et al. 2022, section 4).

* win rate: how often a judge prefers a model's completion to the baseline's, ties counted half (Figure 1);
* reward: the mean score of the completions, if the judge is a reward model; marks from 1 to 7, if it is people;
* KL: E_y~model [ log π_model(y|x) − log π_baseline(y|x) ], in nats per completion (Figure 38's axis);
* alignment tax: the rise of a model's loss on pretraining text over the baseline's, in nats per token (section 4.2).

Models may have other tokenizers and be of other families than the baseline: what is compared is text. KL and tax are
given where the tokens are the same.

    rlhf evaluate --model runs/ppo/model --baseline runs/sft/model --judge runs/reward/model \\
        --prompts held_out.jsonl --output_dir runs/evaluation
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf.batch import Group, groups_of_one
from rlhf.candidates import Candidate, candidates, prompts_of_all, sample_all
from rlhf.checkpoints import describing
from rlhf.config import EvaluateConfig, GenerateConfig
from rlhf.data import PromptExample, read_prompts, read_texts, tokenize_texts
from rlhf.encoder_decoder import EncoderDecoder
from rlhf.files import write_whole
from rlhf.judges import Answers, Judgment, RewardModelJudge, load_judge
from rlhf.loading import ModelError, check_context, check_embedded, name_of
from rlhf.models import LanguageModel
from rlhf.objects import described
from rlhf.processes import Processes
from rlhf.rates import Difference, Rate, win_rate
from rlhf.records import further_fields
from rlhf.report import plot_win_rates
from rlhf.settings import ConfigError, as_plain
from rlhf.sharding import Passes
from rlhf.tables import markdown_table, number
from rlhf.training import console
from rlhf_kernels import linear_cross_entropy, linear_selective_log_softmax

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> dict:
    """Runs the comparison, writes it to ``config.output_dir`` and returns the figures.

    They are those of the ``baseline``, and of each of the ``models`` in their order.
    """
    processes = Processes(config.device)
    *models, baseline = everyone = candidates(config)
    judge = load_judge(config, processes, baseline.tokenizer)
    asked: list[list[PromptExample]] = [[] for _ in everyone]
    if config.prompts:
        readers = [*everyone, *([judge] if isinstance(judge, RewardModelJudge) else [])]
        asked = prompts_of_all(read_prompts(config.prompts), readers, config.lengths)
    chunks = read_chunks(config, everyone)
    tasks = load_tasks(config, processes)
    output = Path(config.output_dir)
    for name in ("config.yaml", "results.json", "completions.jsonl"):
        if (output / name).exists():
            raise ConfigError(f"output_dir: {output} holds {name}; choose another directory, or remove it first")
    with describing(f"{output}: cannot be used for output"):
        output.mkdir(parents=True, exist_ok=True)
    if isinstance(judge, RewardModelJudge):
        judge.load()

    of_baseline = asked[len(models)]
    reference = Reference(baseline, baseline.load(config, processes), of_baseline, chunks, tasks)
    answers = [answer(baseline, reference.model, of_baseline, config, processes)]
    figures = [reference.figures(config, processes)]
    for candidate, examples in zip(models, asked, strict=False):
        said, found = compare(candidate, examples, reference, config, processes)
        answers.append(said)
        figures.append(found)

    judgments: list[Judgment] = []
    if config.prompts and judge is not None:
        judgments = judge.judge(asked[-1], answers[1:], answers[0])
        for mine, judgment in zip(figures[1:], judgments, strict=True):
            mine |= judgment.of_model
            figures[0] |= judgment.of_baseline
    whole = {
        "judge": described(config.judge),
        "seed": config.seed,
        "prompts": len(of_baseline),
        "baseline": figures[0],
        "models": figures[1:],
    }
    check_figures(whole)
    whole["settings"] = as_plain(config)
    if processes.is_main:
        write(output, whole, of_baseline, [*answers[1:], answers[0]], judgments)
    return whole


def answer(
    candidate: Candidate,
    model: LanguageModel | EncoderDecoder,
    examples: Sequence[PromptExample],
    config: EvaluateConfig,
    processes: Processes,
) -> Answers:
    """What a candidate says to every prompt."""
    responses = sample_all(candidate, model, [example.prompt_ids for example in examples], config, processes)
    return Answers(candidate, responses, list(map(candidate.text, responses)))


@dataclass
class Reference:
    """The baseline, which stays loaded while the models come one after another."""

    candidate: Candidate
    model: Any
    examples: Sequence[PromptExample]
    chunks: torch.Tensor | None
    """Pretraining text in its tokens."""
    tasks: Any
    loss: float = math.nan
    results: Any = None

    def figures(self, config: EvaluateConfig, processes: Processes) -> dict[str, Any]:
        """The baseline's own figures, with which those of the models are compared."""
        found: dict[str, Any] = {"name": self.candidate.name}
        if self.chunks is not None:
            self.loss = pretraining_loss(self.model, self.chunks, config.tokens_per_forward, processes)
            found["pretraining_loss"] = self.loss
        if self.tasks:
            self.results = self.tasks.run(self.candidate, self.model.model)
            found["tasks"] = self.results.figures()
        return found


def compare(
    candidate: Candidate,
    examples: Sequence[PromptExample],
    reference: Reference,
    config: EvaluateConfig,
    processes: Processes,
) -> tuple[Answers, dict[str, Any]]:
    """What a model says, and its figures. Its weights are let go of afterwards."""
    model: Any = candidate.load(config, processes)
    said = answer(candidate, model, examples, config, processes)
    found: dict[str, Any] = {"name": candidate.name}
    if candidate.shares_tokens(reference.candidate):
        if examples:
            sides = (model, examples), (reference.model, reference.examples)
            found["kl"] = kl_between(*sides, said.responses, config, processes)
        if reference.chunks is not None:
            loss = pretraining_loss(model, reference.chunks, config.tokens_per_forward, processes)
            found |= {"pretraining_loss": loss, "alignment_tax": loss - reference.loss}
    if reference.tasks:
        found["tasks"] = reference.tasks.run(candidate, model.model).figures(reference.results)
    return said, found


def read_chunks(config: EvaluateConfig, everyone: Sequence[Candidate]) -> torch.Tensor | None:
    """Pretraining text in the tokens of the baseline, which is the last, for the models that share them."""
    if not config.pretraining_data:
        return None
    baseline = everyone[-1]
    texts = read_texts(config.pretraining_data)
    if baseline.is_encoder_decoder:
        raise ConfigError("pretraining_data: is given, but the baseline has an encoder, and no loss on running text")
    sharing = [each for each in everyone if each.shares_tokens(baseline)]
    for each in everyone:
        if each not in sharing:
            logger.warning("%s: has no alignment tax, since its tokens are not those of the baseline", each.name)
    check_context("pretraining_tokens", config.pretraining_tokens, *(each.source for each in sharing))
    chunks = tokenize_texts(texts, baseline.tokenizer, length=config.pretraining_tokens)
    highest = Group([int(chunks.max())], [])  # all chunks as lists would take several times their memory
    check_embedded(baseline.tokenizer, [highest], *(each.source for each in sharing))
    return chunks


def load_tasks(config: EvaluateConfig, processes: Processes) -> Any:
    """The benchmarks, or None."""
    names = config.tasks if isinstance(config.tasks, list) else [config.tasks]
    names = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if not names:
        return None
    if processes.count > 1:
        raise ConfigError(f"tasks: are run by one process, but there are {processes.count}")
    from rlhf.lm_eval_tasks import Tasks  # of an extra, and it takes seconds

    return Tasks(names, config.tasks_dir, config.tokens_per_forward)


def check_figures(figures: Mapping[str, Any], of: str = "") -> None:
    """Raises if a figure is NaN or infinite, so that no such result is written."""
    for key, value in figures.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                check_figures(each, f" of {each['name']}" if "name" in each else of)
            elif isinstance(each, float) and not math.isfinite(each):
                raise ModelError(f"{key}{of}: is {each}; are the models' logits finite?".replace("_", " "))


@torch.no_grad()
def kl_between(
    model: tuple[LanguageModel, Sequence[PromptExample]],
    baseline: tuple[LanguageModel, Sequence[PromptExample]],
    responses: list[list[int]],
    config: EvaluateConfig,
    processes: Processes,
) -> float:
    """Mean over the model's own completions of log π_model − log π_baseline, in nats per completion.

    Each reads its own prompts, which may have a prefix.
    """
    difference = 0.0
    for sign, (each, examples) in ((1, model), (-1, baseline)):
        groups = processes.share(groups_of_one([example.prompt_ids for example in examples], responses))
        op = partial(each.forward, op=linear_selective_log_softmax, temperature=config.temperature)
        with Passes(each) as passes:
            for batch in each.batches(groups, config.tokens_per_forward):
                difference += sign * passes(op, batch).double().sum().item()
    return sum(processes.joined([difference])) / len(responses)


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
    candidate = Candidate.of(name_of(config.model), config.model, config.tokenizer)
    prompts = candidate.read(read_prompts(config.prompts), config.lengths)
    output = Path(config.output_dir) / "completions.jsonl"
    if output.exists():
        raise ConfigError(f"output_dir: {output} exists; choose another directory, or remove it first")
    model = candidate.load(config, processes)
    repeated = [example.prompt_ids for example in prompts for _ in range(config.samples)]
    responses = list(map(candidate.text, sample_all(candidate, model, repeated, config, processes)))
    if not processes.is_main:
        return output
    if empty := sum(not text.strip() for text in responses):
        logger.warning("%d of %d completions are empty", empty, len(responses))
    records = [
        {
            "prompt": example.text,
            "completions": responses[i * config.samples : (i + 1) * config.samples],
            **further_fields(example.extra),
        }
        for i, example in enumerate(prompts)
    ]
    with describing(f"{output}: could not be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, "".join(map(as_line, records)))
    console.print(f"generate: {len(prompts)} prompts × {config.samples} completions in [bold]{output}[/]")
    return output


def as_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON. Dates and the like, which tables may hold, become text."""
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def write(
    output: Path,
    figures: dict[str, Any],
    prompts: Sequence[PromptExample],
    answers: Sequence[Answers],
    judgments: Sequence[Judgment],
) -> None:
    """Writes the figures, a page with a table and Figure 1's plot, and every completion, the baseline's last."""
    records = []
    for i, example in enumerate(prompts):
        record: dict[str, Any] = {"prompt": example.text, "completions": [each.texts[i] for each in answers]}
        record["models"] = [each.candidate.name for each in answers]
        if judgments:
            record["outcomes"] = [judgment.outcomes[i] for judgment in judgments]
            rewards = [judgment.rewards for judgment in judgments if judgment.rewards]
            if rewards:
                record["rewards"] = [*(of_model[i] for of_model, _ in rewards), rewards[0][1][i]]
        records.append({**record, **further_fields(example.extra)})
    with describing(f"{output}: results could not be written"):
        if records:
            write_whole(output / "completions.jsonl", "".join(map(as_line, records)))
        write_whole(output / "results.json", json.dumps(figures, indent=2) + "\n")
        rates = {each["name"]: Rate(**each["win_rate"]) for each in figures["models"] if "win_rate" in each}
        if rates:
            plot_win_rates(rates, figures["baseline"]["name"], output / "win_rates.png")
        write_whole(output / "report.md", describe(figures))
    console.print(f"evaluate: [bold]{output / 'report.md'}[/]")


COLUMNS = {
    "win_rate": ("win rate", lambda value: str(Rate(**value))),
    "judged": ("prompts judged", number),
    "reward": ("mean reward", number),
    "mark": ("mean mark", number),
    "mark_over_baseline": ("mark over the baseline's", lambda value: str(Difference(**value))),
    "kl": ("KL to the baseline (nats per completion)", number),
    "pretraining_loss": ("pretraining loss (nats per token)", number),
    "alignment_tax": ("alignment tax (nats per token)", lambda value: f"{value:+.3f}"),
}
"""The figures of a model: what each is called in the report, and how it is written."""


def describe(figures: dict[str, Any]) -> str:
    """The figures as a page of Markdown: a row for each model, and one for the baseline."""
    rows = [*figures["models"], figures["baseline"]]
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [f"# Against {figures['baseline']['name']}", ""]
    if figures["prompts"]:
        judged = f", judged by {figures['judge']}" if figures["judge"] else ""
        count = "1 prompt" if figures["prompts"] == 1 else f"{figures['prompts']:,} prompts"
        settings = figures["settings"]
        sampled = (
            f"Sampled at temperature {settings['temperature']:g}, at most "
            f"{settings['lengths']['max_response_tokens']} tokens, with seed {figures['seed']}"
        )
        where = "Every completion: `completions.jsonl`. Every setting: `results.json`."
        lines += [f"{count}{judged}. {sampled}. {where}", ""]
    if shown:
        header = ["", *(COLUMNS[name][0] for name in shown)]
        cells = [[COLUMNS[name][1](row[name]) if name in row else "–" for name in shown] for row in rows]
        named = [[row["name"], *own] for row, own in zip(rows, cells, strict=True)]
        lines += [markdown_table(header, named), ""]
    if "win_rate" in shown:
        lines += ["![win rates](win_rates.png)", ""]
    if "tasks" in figures["baseline"]:
        from rlhf import lm_eval_tasks

        lines += ["## Tasks", "", "In brackets: over the baseline, with a 95 % interval.", ""]
        lines += [lm_eval_tasks.describe(figures), ""]
    return "\n".join(lines)


__all__ = ["ModelError", "Rate", "evaluate", "generate", "win_rate"]
