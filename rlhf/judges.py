"""Who says which of two completions is better: a reward model, a Python function, or people.

People are a file of comparisons that ``rlhf label`` exported: each record ranks completions of a prompt, and may have
their marks from 1 to 7. It judges the completions that are in it, by their text.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.batch import Group
from rlhf.candidates import Candidate
from rlhf.config import EvaluateConfig, LengthConfig
from rlhf.data import Limits, PromptExample, PromptRecord, tokenize_prompts
from rlhf.fields import check_rank, field_error, type_and_line, typed
from rlhf.functions import load_function
from rlhf.loading import ModelError, check_embedded, check_reward_config, context_length, load_config, other_tokenizer
from rlhf.models import ScalarModel
from rlhf.objects import is_function
from rlhf.processes import Processes
from rlhf.rates import difference, win_rate
from rlhf.records import beside
from rlhf.reward import score
from rlhf.rewards import RewardError, check_finite, read_anew, shown
from rlhf.settings import ConfigError
from rlhf.sharding import place
from rlhf.sources import FILE_SUFFIXES, sources
from rlhf.turns import answer, prompt

logger = logging.getLogger(__name__)

Figures = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """What one candidate said to every prompt."""

    candidate: Candidate
    responses: list[list[int]]
    texts: list[str]


@dataclass(frozen=True)
class Judgment:
    """What a judge said of one model and the baseline."""

    outcomes: list[float | None]
    """For every prompt: 1 where the model's completion is better, 0 where the baseline's is, 0.5 where neither is, or
    in between where people differ. None where nobody judged."""
    of_model: Figures
    of_baseline: Figures
    rewards: tuple[list[float], list[float]] | None = None
    """Of the model's completions and of the baseline's, where a reward model judges."""

    @classmethod
    def of(
        cls,
        outcomes: Sequence[float | None],
        of_model: Figures,
        of_baseline: Figures,
        rewards: tuple[list[float], list[float]] | None = None,
    ) -> Judgment:
        """Adds the win rate to what else is known of the model."""
        judged = [outcome for outcome in outcomes if outcome is not None]
        return cls(
            list(outcomes), {"win_rate": asdict(win_rate(judged)), "judged": len(judged), **of_model}, of_baseline,
            rewards,
        )  # fmt: skip


class RewardModelJudge:
    """A reward model: the completion with the higher score is better."""

    def __init__(self, source: Any, config: EvaluateConfig, processes: Processes, likely: PreTrainedTokenizerBase):
        check_reward_config(source)
        other = other_tokenizer(likely, source)
        self.tokenizer = other or likely
        self.limit = context_length(load_config(source))
        self.source, self.config, self.processes = source, config, processes
        self.model: ScalarModel | None = None

    def read(self, records: Sequence[PromptRecord], lengths: LengthConfig) -> list[PromptExample]:
        """The prompts in the reward model's tokens, without any prefix."""
        examples = tokenize_prompts(records, self.tokenizer, Limits(**asdict(lengths), context_length=self.limit))
        check_embedded(self.tokenizer, (example.group for example in examples), self.source)
        return examples

    def load(self) -> None:
        """Reads the weights."""
        model = ScalarModel.load(self.source, device=self.processes.device).eval()
        self.model = place(model, self.config.sharding, self.processes)

    def judge(self, prompts: list[PromptExample], models: Sequence[Answers], baseline: Answers) -> list[Judgment]:
        """Scores of every candidate's completions. Those of a prompt share it; equal ones tie exactly."""
        assert self.model is not None
        read = [self.responses(prompts, each) for each in (*models, baseline)]
        answers = list(zip(*read, strict=True))
        groups = [
            Group(example.prompt_ids, list(dict.fromkeys(map(tuple, each))))
            for example, each in zip(prompts, answers, strict=True)
        ]
        share = self.processes.share(groups)
        scores = score(self.model, share, self.config.tokens_per_forward).cpu()
        scores_of_share = scores.split([len(group.responses) for group in share])
        columns = [
            [found[group.responses.index(tuple(response))] for response in each]
            for group, each, found in zip(groups, answers, self.processes.joined(scores_of_share), strict=True)
        ]
        *of_models, of_baseline = [torch.stack(column) for column in zip(*columns, strict=True)]
        for each, values in zip((*models, baseline), (*of_models, of_baseline), strict=True):
            self.check(f"judge: the score of the completion of {each.candidate.name}", values, prompts)
        return [
            Judgment.of(
                [preferred(b, a) for a, b in zip(own.tolist(), of_baseline.tolist(), strict=True)],
                {"reward": own.mean().item()},
                {"reward": of_baseline.mean().item()},
                (own.tolist(), of_baseline.tolist()),
            )
            for own in of_models
        ]

    def responses(self, prompts: list[PromptExample], given: Answers) -> list[list[int]]:
        """Completions in the reward model's tokens: those that were sampled, or their text read anew."""
        if other_tokenizer(self.tokenizer, given.candidate.tokenizer) is None:
            return given.responses
        ended = [response[-1] in given.candidate.ends for response in given.responses]
        try:
            groups = read_anew(prompts, given.texts, ended, self.tokenizer, self.limit)
        except RewardError as error:
            raise ModelError(f"judge: {error}") from error
        return [list(group.responses[0]) for group in groups]

    @staticmethod
    def check(what: str, scores: torch.Tensor, prompts: list[PromptExample]) -> None:
        """Raises if a score is not finite: a NaN would count as a win."""
        try:
            check_finite(what, scores, prompts)
        except RewardError as error:
            raise ModelError(str(error)) from error


class FunctionJudge:
    """A Python function of (prompt, a, b)."""

    def __init__(self, function: Callable[..., Any], processes: Processes):
        self.function, self.processes = function, processes

    def judge(self, prompts: list[PromptExample], models: Sequence[Answers], baseline: Answers) -> list[Judgment]:
        """Each process asks for its share."""
        found = []
        for model in models:
            share = self.processes.share(list(zip(prompts, model.texts, baseline.texts, strict=True)))
            found.append(Judgment.of(self.processes.joined([self.outcome(*each) for each in share]), {}, {}))
        return found

    def outcome(self, example: PromptExample, a: str, b: str) -> float:
        """What the function returns. Raises unless it is a number from 0 to 1."""
        try:
            found = self.function(example.text, a, b)
        except (Exception, SystemExit) as error:  # the function is the user's: anything may happen in it
            raise ConfigError(f"judge: failed at the prompt {shown(example)}: {type_and_line(error)}") from error
        try:
            outcome = math.nan if isinstance(found, (str, bytes)) else float(found)
        except (TypeError, ValueError):
            outcome = math.nan
        if not 0 <= outcome <= 1:
            reason = f"returned {found!r} for the prompt {shown(example)}, must be a number from 0 to 1"
            raise ConfigError(f"judge: {reason}")
        return outcome


class PeopleJudge:
    """A file of comparisons by people."""

    def __init__(self, path: str):
        self.path = path
        self.given: dict[str, list[dict[str, tuple[int, float | None]]]] = defaultdict(list)
        for source in sources(path):
            for where, record in source.records:
                values = typed(record, "completions", list, "an array of strings", where)
                texts = [answer(each, f"completions[{i}]", where, may_be_blank=True) for i, each in enumerate(values)]
                ranks = [check_rank(*rank) for rank in beside(values, "ranks", "an array of integers", record, where)]
                marks: list[Any] = [None] * len(texts)
                if "marks" in record:
                    named = beside(values, "marks", "an array of integers", record, where)
                    marks = [check_mark(*mark) for mark in named]
                rows = zip(map(as_key, texts), zip(ranks, marks, strict=True), strict=True)
                self.given[as_key(prompt(record, where))].append(dict(rows))

    def judge(self, prompts: list[PromptExample], models: Sequence[Answers], baseline: Answers) -> list[Judgment]:
        """The mean over labellers of each prompt. Prompts that nobody judged are left out, with a count.

        Raises:
            ConfigError: nothing at all was judged of a model and the baseline.
        """
        if not any(as_key(example.text) in self.given for example in prompts):
            raise ConfigError(f"judge: {self.path} has none of the {len(prompts)} prompts")
        of_baseline = self.mean_mark(prompts, baseline)
        return [self.compare(prompts, model, baseline, of_baseline) for model in models]

    def compare(
        self, prompts: list[PromptExample], model: Answers, baseline: Answers, of_baseline: Figures
    ) -> Judgment:
        """One model against the baseline."""
        outcomes: list[float | None] = []
        marks = []
        for example, a, b in zip(prompts, model.texts, baseline.texts, strict=True):
            rankings = self.given.get(as_key(example.text), [])
            both = [(ranking[a], ranking[b]) for ranking in rankings if a in ranking and b in ranking]
            outcomes.append(fmean([preferred(one[0], other[0]) for one, other in both]) if both else None)
            marked = [(one[1], other[1]) for one, other in both if one[1] is not None and other[1] is not None]
            if marked:
                marks.append((fmean(one for one, _ in marked), fmean(other for _, other in marked)))
        missing = outcomes.count(None)
        if missing == len(prompts):
            raise ConfigError(
                f"judge: {self.path} has other completions of its prompts than those of {model.candidate.name} and "
                f"{baseline.candidate.name}; give the models, prompts, lengths and seed that were labelled"
            )
        if missing:
            logger.warning(
                "judge: %d of %d completions of %s were not judged", missing, len(prompts), model.candidate.name
            )
        of_model: Figures = {"mark": fmean(one for one, _ in marks)} if marks else {}
        if len(marks) > 1:
            of_model["mark_over_baseline"] = asdict(difference(marks))
        return Judgment.of(outcomes, of_model, of_baseline)

    def mean_mark(self, prompts: list[PromptExample], given: Answers) -> Figures:
        """The mean mark of a candidate's completions, of each prompt by all who marked it."""
        means = []
        for example, text in zip(prompts, given.texts, strict=True):
            rankings = self.given.get(as_key(example.text), [])
            marks = [ranking[text][1] for ranking in rankings if text in ranking]
            known = [mark for mark in marks if mark is not None]
            if known:
                means.append(fmean(known))
        return {"mark": fmean(means)} if means else {}


def preferred(rank: float, other: float) -> float:
    """1 where the first rank is the better one, the lower, and 0.5 for a tie."""
    return 0.5 if rank == other else float(rank < other)


def check_mark(value: Any, name: str, where: str) -> float:
    """A mark from 1 to 7."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value <= 7:
        raise field_error(where, name, f"is {value!r}, expected a number from 1 to 7")
    return float(value)


def as_key(value: Any) -> str:
    """A prompt or completion for comparing: a text, or messages in one way of writing them."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def is_python_judge(judge: Any) -> bool:
    """Whether a judge is a Python function, or the name of one, and neither a reward model nor a file."""
    if isinstance(judge, str):
        return ":" in judge and not Path(judge).exists()
    return is_function(judge)


def load_judge(config: EvaluateConfig, processes: Processes, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The judge that ``config.judge`` names, or None. A reward model may have the given tokenizer."""
    judge: Any = config.judge
    if judge is None:
        return None
    if is_python_judge(judge):
        return FunctionJudge(load_function("judge", judge), processes)
    if isinstance(judge, str) and (Path(judge).is_file() or judge.removesuffix(".gz").endswith(FILE_SUFFIXES)):
        return PeopleJudge(judge)
    return RewardModelJudge(judge, config, processes, tokenizer)


__all__ = ["Answers", "FunctionJudge", "Judgment", "PeopleJudge", "RewardModelJudge", "is_python_judge", "load_judge"]
