"""What there is to know about labels and labellers: agreement, marks, flags, time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from statistics import mean, median
from typing import Any

from rlhf.label.store import Answer, Store
from rlhf.label.tasks import FLAGS, SKIP_REASONS
from rlhf.rates import Rate, agreement, win_rate
from rlhf.tables import markdown_table

PAPER = "the paper's labellers: 72.6 ± 1.5 %; held-out labellers: 77.3 ± 1.3 %"


def describe(store: Store) -> str:
    """The report as a page of Markdown."""
    answers = store.answers()
    given = [each for each in answers if each.answer is not None]
    kind = store.setting("task")
    lines = [
        f"# {store.path.parent}: {kind}",
        "",
        *summary(store, answers, given),
        "",
        "## Labellers",
        "",
        labellers(answers),
    ]
    notes = [f"* {each.labeller}, prompt {each.number + 1}: {each.skipped['note']}" for each in answers
             if each.skipped and each.skipped["note"]]  # fmt: skip
    if notes:
        lines += ["", "## What was said of skipped prompts", "", *(" ".join(note.split()) for note in notes)]
    if kind != "demonstration" and given:
        lines += ["", "## Marks and flags", "", marks_and_flags(store, given)]
        if compared := models(store, given):
            lines += ["", "## Models", "", compared]
    return "\n".join(lines) + "\n"


def summary(store: Store, answers: Sequence[Answer], given: Sequence[Answer]) -> list[str]:
    """How much there is, and how far labellers agree."""
    prompts = len({each.number for each in given})
    lines = [f"{len(given)} answers to {prompts} of {store.count()} prompts, {len(answers) - len(given)} skipped."]
    if store.setting("task") != "demonstration":
        found = agreement(combinations(ranks.values(), 2) for ranks in rankings(given))
        said = "not known: it takes two prompts that two labellers ranked" if found is None else str(found)
        lines += ["", f"Agreement between labellers: {said} ({PAPER})."]
    return lines


def rankings(given: Sequence[Answer]) -> list[dict[Any, list[int]]]:
    """Of each task, the ranks that each labeller gave."""
    found: dict[int, dict[Any, list[int]]] = defaultdict(dict)
    for each in given:
        found[each.number][each.labeller] = (each.answer or {})["ranks"]
    return list(found.values())


def labellers(answers: Sequence[Answer]) -> str:
    """A row for every labeller."""
    names = sorted({each.labeller for each in answers})
    given = [each for each in answers if each.answer is not None]
    ranked = [] if any("ranks" not in (each.answer or {}) for each in given) else rankings(given)
    rows = []
    for name in names:
        own = [each for each in given if each.labeller == name]
        reasons = Counter(each.skipped["reason"] for each in answers if each.labeller == name and each.skipped)
        skipped = ", ".join(f"{count} × {SKIP_REASONS[reason]}" for reason, count in reasons.most_common())
        found = agreement(
            [(ranks[name], ranks[other]) for other in ranks if other != name] for ranks in ranked if name in ranks
        )
        seconds = f"{median(each.seconds for each in own):.0f} s" if own else "–"
        changed = sum(each.changes > 0 for each in own)
        rows.append([name, str(len(own)), str(changed), seconds, "–" if found is None else str(found), skipped or "–"])
    return markdown_table(
        ["labeller", "answers", "changed", "median time", "agreement with the others", "skipped"], rows
    )


def marks_and_flags(store: Store, given: Sequence[Answer]) -> str:
    """How often each mark and each flag was given."""
    marks = [mark for each in given for mark in (each.answer or {})["marks"]]
    flags = Counter(flag for each in given for names in (each.answer or {})["flags"] for flag in names)
    rows = [["mean mark (1 to 7)", f"{mean(marks):.2f}"]]
    rows += [[f"mark {mark}", f"{marks.count(mark) / len(marks):.1%}"] for mark in sorted(set(marks))]
    rows += [[words, f"{flags[name] / len(marks):.1%}"] for name, words in FLAGS.items()]
    return markdown_table(["of all completions", ""], rows)


def models(store: Store, given: Sequence[Answer]) -> str | None:
    """Where records name the models that wrote the completions: their mean marks, and win rates between them."""
    marks: dict[str, list[int]] = defaultdict(list)
    outcomes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for each in given:
        names = (store.task(each.number) or {}).get("models")
        said: dict[str, Any] = each.answer or {}
        if not isinstance(names, list) or len(names) != len(said["ranks"]) or not all(map(is_text, names)):
            continue
        for name, mark in zip(names, said["marks"], strict=True):
            marks[name].append(mark)
        ranked = sorted(zip(names, said["ranks"], strict=True))  # in one order, whichever the record has
        for (one, first), (other, second) in combinations(ranked, 2):
            outcomes[one, other].append(0.5 if first == second else float(first < second))
    if not marks:
        return None
    rows = [[f"mean mark of {name}", f"{mean(values):.2f}"] for name, values in marks.items()]
    rates: dict[tuple[str, str], Rate] = {names: win_rate(values) for names, values in outcomes.items()}
    rows += [[f"{one} is preferred to {other}", str(rate)] for (one, other), rate in rates.items()]
    return markdown_table(["", ""], rows)


def is_text(value: Any) -> bool:
    """Whether a value is a text, as a model's name must be."""
    return isinstance(value, str)
