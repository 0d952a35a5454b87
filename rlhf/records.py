"""Reading data: every record is checked before anything is trained on it.

==============  =========================================================================================
demonstrations  ``{"prompt", "completion"}``, or ``{"messages"}``, whose last turn, the assistant's, is the
                completion and everything before it the prompt
comparisons     ``{"prompt", "completions": [K]}`` with ``{"ranks": [K]}`` (1 is best, ties allowed) or
                ``{"scores": [K]}`` (higher is better); ``{"prompt", "answers": [{"answer", "rank"}]}``;
                ``{"prompt", "chosen", "rejected"}``, or ``{"chosen", "rejected"}`` as whole conversations or
                transcripts, whose common beginning is the prompt
prompts         ``{"prompt"}``, or any of the above
texts           ``{"text"}``, or plain text: a ``.txt`` file is one document
==============  =========================================================================================

A prompt is a string or a list of messages ``{"role", "content"}``, a completion a string or the assistant's message.
Further fields are ignored, but those beside a prompt are kept, and ``tools`` go to the chat template. ``docs/data.md``
has an example of each layout, :mod:`rlhf.sources` says where records may come from. A bad record is a
:class:`DataError` of one line, with file, line and field.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.fields import (
    PAGE,
    DataError,
    check_rank,
    check_score,
    counted,
    field_error,
    first_line,
    kind,
    listed,
    messages,
    present,
    string,
    typed,
)
from rlhf.pairs import whole_pair
from rlhf.sources import Data, Record, sources
from rlhf.turns import Completion, Prompt, answer, before_answer, prompt, spoken, tools

logger = logging.getLogger(__name__)

TIED, BLANK = "all tied", "an answer is blank"
"""Why a comparison holds no preference."""
ANSWER_FIELDS = {"prompt", "messages", "completion", "completions", "chosen", "rejected", "answers", "ranks", "scores"}
"""Fields that hold answers in any layout. They are not copied to records that get answers of their own."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and how a labeller answered it."""

    prompt: Prompt
    completion: Completion
    where: str
    """``file:line``."""
    fields: tuple[str, ...] = ("prompt", "completion")
    """The record's names for its prompt and its completion, for later errors."""
    tools: list[dict[str, Any]] | None = None
    """What the assistant may call, for the chat template."""


@dataclass(frozen=True)
class Comparison:
    """A prompt with K completions, ranked by a labeller: 1 is best, equal ranks are ties."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    ranks: tuple[int, ...]
    where: str
    fields: tuple[str, ...]
    """The record's names for its prompt and each of its completions."""
    tools: list[dict[str, Any]] | None = None
    left_out: int = 0
    """Blank completions of the record, which are not among these: there is nothing to score."""


@dataclass(frozen=True)
class PromptRecord:
    """A prompt alone."""

    prompt: Prompt
    where: str
    fields: tuple[str, ...] = ("prompt",)
    tools: list[dict[str, Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """The fields of the record that its prompt was not read from."""


def read_demonstrations(data: Data) -> list[Demonstration]:
    """All demonstrations in order."""
    return [demonstration(record, where) for source in sources(data) for where, record in source.records]


def read_comparisons(data: Data) -> list[Comparison]:
    """All comparisons in order, without those that hold no preference: all tied, or with a blank answer."""
    comparisons: list[Comparison] = []
    for source in sources(data):
        found = [comparison(record, where) for where, record in source.records]
        kept = [record for record in found if not no_preference(record)]
        skipped = Counter(reason for record in found if (reason := no_preference(record)))
        if not kept:
            reason = "is tied" if set(skipped) == {TIED} else "is tied or has a blank answer"
            raise DataError(f"{source.name}: field 'ranks': every comparison {reason} ({len(found)} of {len(found)})")
        for reason, count in skipped.items():
            logger.warning("%s: skipped %d of %d comparisons: %s", source.name, count, len(found), reason)
        if left_out := sum(record.left_out for record in kept):
            logger.warning("%s: left out %d blank completions of comparisons", source.name, left_out)
        comparisons += kept
    return comparisons


def read_prompts(data: Data) -> list[PromptRecord]:
    """All prompts in order."""
    return [prompt_record(record, where) for source in sources(data) for where, record in source.records]


def read_texts(data: Data) -> list[str]:
    """All documents in order. Blank ones are left out, since some data sets are full of them."""
    texts: list[str] = []
    for source in sources(data, documents=True):
        found = [string(record, "text", where) for where, record in source.records]
        found = [text for text in found if text.strip()]
        if not found:
            raise DataError(f"{source.name}: holds no text")
        texts += found
    return texts


# One record ------------------------------------------------------------------------------------------------------


def demonstration(record: Record, where: str) -> Demonstration:
    """Checks one demonstration."""
    asked: Prompt
    if "messages" in record and "completion" not in record:
        turns = messages(record, "messages", where)
        if turns[-1]["role"] != "assistant":
            raise field_error(where, "messages", f"ends with the turn of the {turns[-1]['role']}, not the assistant's")
        asked, name = before_answer(record, turns[:-1], "messages", where), f"messages[{len(turns) - 1}]"
        completion = spoken(turns[-1], name, where, may_be_blank=False)
        fields = ("messages", "messages")
    else:
        asked = prompt(record, where)
        completion = answer(present(record, "completion", where), "completion", where)
        fields = ("prompt", "completion")
    if isinstance(record.get("label"), bool):
        reason = f"says whether the answer is good, and a demonstration is to be: {PAGE} keeps those that are"
        raise field_error(where, "label", reason)
    return Demonstration(asked, completion, where, fields, tools(record, asked, where))


def comparison(record: Record, where: str) -> Comparison:
    """Checks one comparison. Two answers that are the same are a tie."""
    fields: tuple[str, ...]
    left_out = 0
    if "completions" not in record and ("chosen" in record or "rejected" in record):
        pair = whole_pair(record, where)
        if pair:
            asked, fields, texts = pair.prompt, ("chosen", "chosen", "rejected"), [pair.chosen, pair.rejected]
        else:
            asked, fields = prompt(record, where), ("prompt", "chosen", "rejected")
            texts = [answer(record[name], name, where) for name in fields[1:]]
        ranks = [1, 1] if texts[0] == texts[1] else [1, 2]
    else:
        asked = prompt(record, where)
        ranking = answers if "answers" in record and "completions" not in record else completions
        names, texts, ranks = ranking(record, where)
        written = [i for i, text in enumerate(texts) if not is_blank(text)]
        if len(written) > 1:
            left_out = len(texts) - len(written)
            names, texts, ranks = [names[i] for i in written], [texts[i] for i in written], [ranks[i] for i in written]
        fields = ("prompt", *names)
    return Comparison(asked, tuple(texts), tuple(ranks), where, fields, tools(record, asked, where), left_out)


def completions(record: Record, where: str) -> tuple[list[str], list[Completion], list[int]]:
    """The names, texts and ranks of the field ``completions``, beside ``ranks`` or ``scores``."""
    values = typed(record, "completions", list, "an array of strings or messages", where)
    names = [f"completions[{i}]" for i in range(len(values))]
    texts = [answer(value, name, where, may_be_blank=True) for name, value in zip(names, values, strict=True)]
    at_least_two(values, "completions", where)
    if "ranks" not in record and "scores" in record:
        scores = [check_score(*score) for score in beside(values, "scores", "an array of numbers", record, where)]
        places = {score: place for place, score in enumerate(sorted(set(scores), reverse=True), start=1)}
        return names, texts, [places[score] for score in scores]
    ranks = beside(values, "ranks", "an array of integers", record, where)
    return names, texts, [check_rank(*rank) for rank in ranks]


def beside(values: Sequence[Any], name: str, expected: str, record: Record, where: str) -> list[tuple[Any, str, str]]:
    """The values of a field that has one for each completion. Each comes with its name and place, for its check."""
    found = typed(record, name, list, expected, where)
    if len(found) != len(values):
        raise field_error(where, name, f"has {counted(found)} but 'completions' has {len(values)}")
    return [(value, f"{name}[{i}]", where) for i, value in enumerate(found)]


def answers(record: Record, where: str) -> tuple[list[str], list[Completion], list[int]]:
    """The names, texts and ranks of the field ``answers``, each an object with ``answer`` and ``rank``."""
    values = typed(record, "answers", list, "an array of objects with 'answer' and 'rank'", where)
    names, texts, ranks = [], [], []
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise field_error(where, f"answers[{i}]", f"is {kind(value)}, expected an object with 'answer' and 'rank'")
        for key in ("answer", "rank"):
            if key not in value:
                raise field_error(where, f"answers[{i}].{key}", f"is missing; the answer has {listed(value)}")
        names.append(f"answers[{i}].answer")
        texts.append(answer(value["answer"], names[-1], where, may_be_blank=True))
        ranks.append(check_rank(value["rank"], f"answers[{i}].rank", where))
    at_least_two(values, "answers", where)
    return names, texts, ranks


def at_least_two(values: Sequence[Any], name: str, where: str) -> None:
    """Raises unless there is something to compare."""
    if len(values) < 2:
        raise field_error(where, name, f"has {counted(values)}, but a comparison needs at least 2")


def no_preference(record: Comparison) -> str | None:
    """Why a comparison holds no preference; None if it holds one."""
    if len(set(record.ranks)) == 1:
        return TIED
    return BLANK if any(map(is_blank, record.completions)) else None


def is_blank(completion: Completion) -> bool:
    """Whether the assistant said nothing."""
    return isinstance(completion, str) and not completion.strip()


def further_fields(record: Record) -> dict[str, Any]:
    """The fields of a record that hold neither its prompt nor answers to it: ``tools``, an id, …"""
    return {name: value for name, value in record.items() if name not in ANSWER_FIELDS}


def prompt_record(record: Record, where: str) -> PromptRecord:
    """Checks the prompt of a record of any kind. It is the prompt that training on the record would use."""
    asked: Prompt
    read: tuple[str, ...] = ("prompt",)
    if "prompt" in record and any(name in record for name in ("completion", "completions", "answers")):
        asked = prompt(record, where)
    elif "chosen" in record and "rejected" in record:
        pair = whole_pair(record, where)
        asked = pair.prompt if pair else prompt(record, where)
        read = ("chosen", "rejected", "prompt") if pair else read
    elif "messages" in record:
        turns = messages(record, "messages", where)
        answered = turns[-1]["role"] == "assistant"
        asked = before_answer(record, turns[:-1] if answered else turns, "messages", where)
        read = ("messages", "prompt")
    else:
        asked = prompt(record, where)
    extra = {name: value for name, value in record.items() if name not in read}
    return PromptRecord(asked, where, read[:1], tools(record, asked, where), extra)


__all__ = [
    "Comparison",
    "Completion",
    "Data",
    "DataError",
    "Demonstration",
    "Prompt",
    "PromptRecord",
    "field_error",
    "first_line",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "read_texts",
]
