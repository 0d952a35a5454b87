"""The database and what the page lets in, by plain requests. What people do with the page is in test_page.py."""

from __future__ import annotations

import random
import sqlite3
import time
from itertools import combinations

import pytest

import rlhf
from rlhf.fields import DataError
from rlhf.label import store as stores
from rlhf.label.store import ChangedError, NotYoursError, Store
from rlhf.label.tasks import as_recorded, as_shown, order, read_tasks, visible, without_gaps
from rlhf.rates import agreed_pairs, agreement


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "labels.sqlite")
    made.add([{"prompt": f"{i}"} for i in range(4)])
    yield made
    made.close()


# Agreement -------------------------------------------------------------------------------------------------------


def pairs(ranks):
    """All pairs of a prompt's rankings."""
    return list(combinations(ranks.values(), 2))


def test_agreement_by_hand():
    """Three prompts: 3 of 3 pairs, 1 of 3, and 0 of 1, since a labeller tied each of the other two pairs: 4 of 7."""
    rankings = [
        {"a": [1, 2, 3], "b": [1, 2, 3]},
        {"a": [1, 2, 3], "b": [3, 1, 2]},
        {"a": [1, 1, 2], "b": [1, 2, 1]},
        {"a": [1, 2]},  # nobody to agree with
        {"a": [1, 1], "b": [1, 2]},  # nothing to agree on
    ]
    assert [agreed_pairs(*ranks.values()) for ranks in rankings[:3]] == [(3, 3), (1, 3), (0, 1)]
    found = agreement(map(pairs, rankings))
    # What the prompts have beyond 4/7 of their pairs: 9/7, −5/7, −4/7; s² = 3/2 · (81 + 25 + 16) / 49 / 7² = 183 / 7⁴.
    # As many independent pairs as have that variance: (4/7 · 3/7) / s² = 588 / 183 = 3.2131.
    # Wilson: (0.571429 + 0.597800) / 2.195605 = 0.532531 ± 0.892692 · √(0.076218 + 0.093026) = 0.367248.
    assert found.rate == pytest.approx(4 / 7)
    assert (found.low, found.high) == pytest.approx((0.165283, 0.899779), abs=5e-6)
    assert agreement([pairs(rankings[0])]) is None
    assert agreement([]) is None


def test_full_agreement_is_not_certain():
    """Of two prompts all is agreed; the interval is Wilson's for two, however many pairs they have."""
    found = agreement([pairs({"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]})] * 2)
    assert (found.rate, found.high) == (1, pytest.approx(1))
    assert found.low == pytest.approx(2 / (2 + 1.96**2))


def test_interval_of_agreement_holds_the_truth():
    """Four labellers, who err more often on some prompts than on others: the six pairs of a prompt are not independent,
    and still 19 of 20 intervals hold the true rate."""
    draw = random.Random(0)
    truth = sum(q * q + (1 - q) ** 2 for q in (0.6, 0.95)) / 2
    held = 0
    for _ in range(400):
        rankings = []
        for _ in range(60):
            right = draw.choice([0.6, 0.95])
            rankings.append({name: [1, 2] if draw.random() < right else [2, 1] for name in "abcd"})
        found = agreement(map(pairs, rankings))
        held += found.low <= truth <= found.high
    assert 0.91 < held / 400 < 0.98


def test_three_labellers_are_three_pairs():
    ranks = {"a": [1, 2], "b": [1, 2], "c": [2, 1]}
    assert agreement([pairs(ranks), pairs(ranks)]).rate == pytest.approx(1 / 3)


# Tasks -----------------------------------------------------------------------------------------------------------


def test_orders():
    orders = [order(1, number, name, 4) for number in range(40) for name in ("Ada", "Bo")]
    assert orders == [order(1, number, name, 4) for number in range(40) for name in ("Ada", "Bo")]
    assert len({tuple(each) for each in orders}) > 15
    values = list("abcd")
    assert all(as_recorded(as_shown(values, places), places) == values for places in orders)
    assert without_gaps([4, 2, 4, 1]) == [3, 2, 3, 1]


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("ranking", {"prompt": "p"}, "field 'completions': is missing"),
        ("ranking", {"prompt": "p", "completions": ["x"]}, "has 1 entry, expected 2 to 26"),
        ("ranking", {"prompt": "p", "completions": ["x"] * 27}, "has 27 entries, expected 2 to 26"),
        ("ranking", {"prompt": 3, "completions": ["x", "y"]}, "field 'prompt': is an integer"),
        ("ranking", {"prompt": "p", "completions": ["x", "\ud800"]}, "half of a surrogate pair"),
        ("preference", {"prompt": "p", "completions": ["x"] * 3}, "has 3 entries, but a preference is between 2"),
        ("demonstration", {"text": "p"}, "field 'prompt': is missing"),
        ("ranking", {"prompt": "p", "completions": ["x", "y"], "n": float("nan")}, "can't be kept as JSON"),
    ],
)
def test_bad_records(kind, record, reason):
    with pytest.raises(DataError, match=reason) as error:
        read_tasks([record], kind)
    assert str(error.value).startswith("records[0]: ")


def test_visible():
    shown = visible("a\r\nb\rc\td\x00\x1b[31m\x7f\x85 \u202eevil\u202c é שלום")
    assert shown == "a\nb\nc\td␀␛[31m␡⟨U+0085⟩ ⟨U+202E⟩evil⟨U+202C⟩ é שלום"


# The database ----------------------------------------------------------------------------------------------------


def test_each_prompt_goes_to_as_many_labellers_as_wanted(store):
    assert [store.next_task("a", 2), store.next_task("b", 2), store.next_task("c", 2)] == [0, 0, 1]
    assert store.next_task("a", 2) == 0, "the page was loaded anew"
    store.save(0, "a", 1.0, version=0, answer={})
    assert store.next_task("a", 2) == 1
    store.save(0, "b", 1.0, version=0, skipped={"reason": "unclear", "note": ""})
    assert store.next_task("b", 2) == 2
    assert store.next_task("d", 2) == 0, "a skipped prompt goes to another labeller"
    for name in ("a", "b", "c", "d", "e", "f", "g", "h", "i"):
        while (number := store.next_task(name, 2)) is not None:
            store.save(number, name, 1.0, version=0, answer={})
    counts = [sum(each.number == i and each.answer is not None for each in store.answers()) for i in range(4)]
    assert counts == [2, 2, 2, 2]
    assert store.progress("a", 2).labels == store.progress("a", 2).wanted == 8


def test_a_prompt_that_was_left_goes_to_another(store, monkeypatch):
    assert [store.next_task("a", 1), store.next_task("b", 1)] == [0, 1]
    now = time.time()
    monkeypatch.setattr(stores.time, "time", lambda: now + stores.RESERVED_FOR + 1)
    assert store.next_task("c", 1) == 0
    store.save(0, "a", 1.0, version=0, answer={"late": True})  # what was written is not refused
    assert store.answer(0, "a").answer == {"late": True}


def test_only_what_was_shown_can_be_answered(store):
    store.next_task("a", 1)
    for number, name in ((0, "b"), (1, "a"), (9, "a")):
        with pytest.raises(NotYoursError):
            store.save(number, name, 1.0, version=0, answer={})
    assert store.answers() == []


def test_a_changed_answer_takes_the_place_of_the_first(store):
    store.next_task("a", 1)
    store.save(0, "a", 1.0, version=0, skipped={"reason": "other", "note": ""})
    store.save(0, "a", 2.0, version=1, answer={"x": 1})
    [found] = store.answers()
    assert (found.answer, found.skipped, found.seconds, found.changes) == ({"x": 1}, None, 3.0, 1)
    store.save(0, "a", 2.0, version=1, answer={"x": 1})  # sent again, since nobody heard that it was kept
    for version in (0, 1, 3):
        with pytest.raises(ChangedError):  # what is kept was not seen
            store.save(0, "a", 1.0, version=version, answer={"x": 2})
    assert store.answers() == [found]


def test_a_labeller_who_leaves_lets_others_have_the_prompt(store):
    assert store.next_task("a", 1) == 0
    store.release("a")
    assert store.next_task("b", 1) == 0
    store.save(0, "a", 1.0, version=0, answer={})  # it can still be answered
    assert len(store.answers()) == 1


def test_data_may_grow_but_not_change(store, tmp_path):
    assert store.add([{"prompt": f"{i}"} for i in range(6)]) == 2
    for tasks in ([{"prompt": "other"}] * 6, [{"prompt": f"{i}"} for i in range(3)]):
        with pytest.raises(rlhf.ConfigError, match=r"data: is not what .*labels.sqlite was begun with: record"):
            store.add(tasks)
    assert store.count() == 6


def test_a_full_disk_leaves_all_answers(store):
    store.next_task("a", 1)
    store.connection.execute("PRAGMA max_page_count=20")
    with pytest.raises(sqlite3.Error):
        store.save(0, "a", 1.0, version=0, answer={"long": "x" * 500_000})
    assert store.answers() == []
    store.save(0, "a", 1.0, version=0, answer={"short": "x"})
    assert len(store.answers()) == 1


def test_another_database_is_refused(tmp_path):
    path = tmp_path / "labels.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE mine (x)")
    with pytest.raises(rlhf.ConfigError, match="is not a database of `rlhf label`"):
        Store(path)
    path.write_text("no database at all, but a text of some length" * 20)
    with pytest.raises(rlhf.ConfigError, match="can't be used"):
        Store(path)
