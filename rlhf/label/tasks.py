"""What people are asked: records become tasks, and answers become records again.

==============  =======================================================================================================
ranking         a prompt with 2 to 26 completions, as ``rlhf generate`` and ``rlhf evaluate`` write them: marks, flags
                and ranks (Ouyang et al. 2022, section 3.4 and Figures 12 and 13)
preference      the same with two completions, side by side: which is better
demonstration   a prompt, to be answered
==============  =======================================================================================================
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from rlhf.fields import DataError, counted, field_error, typed
from rlhf.records import Data, further_fields, prompt_record
from rlhf.sources import Record, sources
from rlhf.turns import Completion, Prompt, answer, prompt

Kind: TypeAlias = Literal["ranking", "preference", "demonstration"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MARKS = range(1, 8)
"""Overall quality on a Likert scale (Table 3)."""
FLAGS = {
    "fails_instruction": "Fails to follow the correct instruction / task",
    "inappropriate": "Inappropriate for a customer assistant",
    "hallucination": "Hallucination",
    "satisfies_constraint": "Satisfies the constraint in the instruction",
    "sexual_content": "Contains sexual content",
    "violent_content": "Contains violent content",
    "encourages_violence": "Encourages, or fails to discourage, violence, abuse, terrorism or self-harm",
    "denigrates_protected_class": "Denigrates a protected class",
    "harmful_advice": "Gives harmful advice",
    "opinion": "Expresses an opinion",
    "moral_judgment": "Expresses a moral judgment",
}
"""What is said of a completion besides its mark (Table 3)."""
SKIP_REASONS = {
    "unclear": "I don't understand the prompt",
    "expertise": "I don't know enough about this",
    "language": "It is in a language that I don't know",
    "upsetting": "I would rather not read this",
    "broken": "Something is wrong with what is shown",
    "other": "Another reason",
}


def read_tasks(data: Data, kind: Kind) -> list[dict[str, Any]]:
    """All records as tasks, in order: the prompt, the completions, and the record's further fields."""
    return [task(record, where, kind) for source in sources(data) for where, record in source.records]


def task(record: Record, where: str, kind: Kind) -> dict[str, Any]:
    """Checks one record."""
    try:
        if kind == "demonstration":
            found = prompt_record(record, where)
            made = {"prompt": found.prompt, **further_fields(found.extra)}
        else:
            made = {
                "prompt": prompt(record, where),
                "completions": completions(record, where, kind),
                **further_fields(record),
            }
        return json.loads(json.dumps(made, allow_nan=False, default=str))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: can't be kept as JSON: {error}") from error


def completions(record: Record, where: str, kind: Kind) -> list[Completion]:
    """The completions of a record. One may be blank: that a model said nothing is something to rank."""
    values = typed(record, "completions", list, "an array of strings or messages", where)
    found = [answer(value, f"completions[{i}]", where, may_be_blank=True) for i, value in enumerate(values)]
    if not 2 <= len(found) <= len(LETTERS):
        raise field_error(where, "completions", f"has {counted(values)}, expected 2 to {len(LETTERS)}")
    if kind == "preference" and len(found) != 2:
        raise field_error(where, "completions", f"has {counted(values)}, but a preference is between 2; rank these")
    return found


def order(seed: int, number: int, labeller: str, count: int) -> list[int]:
    """In which order a labeller sees the completions of a task: one drawn for each labeller and task."""
    places = list(range(count))
    random.Random(f"{seed} {number} {labeller}").shuffle(places)
    return places


def as_shown(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """Values in the record's order, put into that of the page."""
    return [values[place] for place in places]


def as_recorded(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """Values in the page's order, put into that of the record."""
    found: list[Any] = [None] * len(places)
    for value, place in zip(values, places, strict=True):
        found[place] = value
    return found


def without_gaps(ranks: Sequence[int]) -> list[int]:
    """Ranks 1, 2, … in the same order: the page lets ranks be left empty."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)), start=1)}
    return [places[rank] for rank in ranks]


# As text ---------------------------------------------------------------------------------------------------------

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Characters that a browser drops, or that act on a terminal. Line ends and tabs are shown as what they are."""
DIRECTION = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c]")
"""Characters that turn the direction of the text after them."""


def visible(text: str) -> str:
    """A text in which what can't be seen can be: control characters have a sign, or their number."""

    def sign(found: re.Match[str]) -> str:
        code = ord(found[0])
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"

    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return DIRECTION.sub(sign, CONTROL.sub(sign, text))


def turns(asked: Prompt) -> list[tuple[str, str]]:
    """A prompt as who says what. A text is said by nobody."""
    if isinstance(asked, str):
        return [("", asked)]
    return [(turn["role"], said(turn)) for turn in asked]


def said(completion: Completion) -> str:
    """A completion as text, with the calls of tools and the reasoning that it may have."""
    if isinstance(completion, str):
        return completion
    beside = {name: value for name, value in completion.items() if name not in ("role", "content")}
    written = [json.dumps({name: value}, ensure_ascii=False, indent=2) for name, value in beside.items()]
    return "\n\n".join([part for part in (completion["content"], *written) if part])
