"""The database: tasks and answers in one SQLite file, from which nothing is lost that was acknowledged.

SQLite writes ahead (WAL) and waits for the disk at every commit (``synchronous=FULL``), so an answer is on the disk
before whoever gave it hears so. Reports and exports read while the page is being served.
"""

from __future__ import annotations

import json
import math
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.settings import ConfigError

RESERVED_FOR = 3600.0
"""Seconds for which a task waits for the labeller to whom it was shown, before another gets it."""
SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tasks (number INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE reserved (
    number INTEGER NOT NULL REFERENCES tasks, labeller TEXT NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (number, labeller)
);
CREATE TABLE answers (
    number INTEGER NOT NULL REFERENCES tasks, labeller TEXT NOT NULL,
    answer TEXT, skipped TEXT, seconds REAL NOT NULL, time REAL NOT NULL, changes INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (number, labeller), CHECK ((answer IS NULL) != (skipped IS NULL))
);
CREATE INDEX by_labeller ON answers (labeller, time);
"""
APPLICATION_ID = 0x726C6866
"""In the file's header, so that another database is not taken for one of ours."""


@dataclass(frozen=True)
class Answer:
    """What a labeller said of a task, in the order of the record."""

    number: int
    labeller: str
    answer: dict[str, Any] | None
    """None if the task was skipped."""
    skipped: dict[str, Any] | None
    seconds: float
    """For how long the page was looked at."""
    time: float
    """Of the last change, in seconds since 1970."""
    changes: int


@dataclass(frozen=True)
class Progress:
    """How far one labeller is, and all are."""

    answered: int
    skipped: int
    labels: int
    """Answers by all."""
    wanted: int


class NotYoursError(Exception):
    """An answer to a task that was never shown to this labeller."""


class ChangedError(Exception):
    """An answer in place of one that the labeller did not see: it was given in another window."""


class Store:
    """Tasks and answers. One connection, used by one thread at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.lock = threading.Lock()
        try:
            self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
            found = self.connection.execute("PRAGMA application_id").fetchone()[0]
            empty = not self.connection.execute("SELECT 1 FROM sqlite_master").fetchone()
            if not empty and found != APPLICATION_ID:
                raise ConfigError(f"output_dir: {path} is not a database of `rlhf label`")
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=FULL")
            with self.writing() as run:
                if empty:
                    for statement in SCHEMA.split(";"):
                        run(statement)
                    run(f"PRAGMA application_id={APPLICATION_ID}")
                    run("INSERT INTO settings VALUES ('id', ?)", (secrets.token_hex(8),))
        except sqlite3.Error as error:
            raise ConfigError(f"output_dir: {path} can't be used: {error}") from error

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """A transaction: all of it is on the disk afterwards, or nothing."""
        with self.lock:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection.execute
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def read(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """The rows of a query."""
        with self.lock:
            return self.connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Closes the file, which takes the log of writes into it."""
        self.connection.close()

    # Settings and tasks ----------------------------------------------------------------------------------------------

    def setting(self, name: str) -> str | None:
        """A setting that the database keeps."""
        found = self.read("SELECT value FROM settings WHERE name = ?", (name,))
        return found[0][0] if found else None

    def keep(self, name: str, value: str) -> str:
        """Keeps a setting, unless it is kept already, and returns what is kept."""
        with self.writing() as run:
            run("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, value))
        return self.setting(name) or value

    def add(self, tasks: list[dict[str, Any]]) -> int:
        """Adds tasks, and returns how many are new. Those that are there must be the first of them, as they were."""
        lines = [json.dumps(task, ensure_ascii=False) for task in tasks]
        with self.writing() as run:
            known = [record for (record,) in run("SELECT record FROM tasks ORDER BY number")]
            if lines[: len(known)] != known:
                at = next((i for i, pair in enumerate(zip(lines, known)) if len(set(pair)) > 1), len(lines))  # noqa: B905
                raise ConfigError(
                    f"data: is not what {self.path} was begun with: record {at + 1} differs or is missing; "
                    "records can be added at the end, others go into another output_dir"
                )
            new = list(enumerate(lines))[len(known) :]
            for each in new:
                run("INSERT INTO tasks VALUES (?, ?)", each)
        return len(new)

    def count(self) -> int:
        """How many tasks there are."""
        return self.read("SELECT count(*) FROM tasks")[0][0]

    def task(self, number: int) -> dict[str, Any] | None:
        """A task by its number."""
        found = self.read("SELECT record FROM tasks WHERE number = ?", (number,))
        return json.loads(found[0][0]) if found else None

    # Labellers -------------------------------------------------------------------------------------------------------

    def next_task(self, labeller: str, labels_per_prompt: int) -> int | None:
        """The number of the task that a labeller is to answer next, which then waits for them; None if there is none.

        A task that waits for the labeller already comes first, then the first that lacks answers and that no others
        are busy with.
        """
        now = time.time()
        with self.writing() as run:
            found = run(
                "SELECT number FROM reserved WHERE labeller = ? AND until > ? ORDER BY number LIMIT 1", (labeller, now)
            ).fetchone()
            found = (
                found
                or run(
                    """
                SELECT number FROM tasks AS task
                WHERE NOT EXISTS (SELECT 1 FROM answers WHERE number = task.number AND labeller = ?)
                AND (SELECT count(*) FROM answers WHERE number = task.number AND skipped IS NULL)
                    + (SELECT count(*) FROM reserved WHERE number = task.number AND until > ?) < ?
                ORDER BY number LIMIT 1
                """,
                    (labeller, now, labels_per_prompt),
                ).fetchone()
            )
            if found is None:
                return None
            run("INSERT OR REPLACE INTO reserved VALUES (?, ?, ?)", (found[0], labeller, now + RESERVED_FOR))
        return found[0]

    def was_shown(self, number: int, labeller: str) -> bool:
        """Whether a task is or was a labeller's."""
        query = "SELECT 1 FROM {} WHERE number = ? AND labeller = ?"
        return any(self.read(query.format(table), (number, labeller)) for table in ("answers", "reserved"))

    def save(
        self,
        number: int,
        labeller: str,
        seconds: float,
        *,
        version: int,
        answer: dict[str, Any] | None = None,
        skipped: dict[str, Any] | None = None,
    ) -> None:
        """Keeps an answer, or that a task was skipped, in place of what the labeller had said of it before.

        ``version`` is that of the answer which the labeller saw, 0 for none. An answer may be sent twice, since it is
        not always heard that it was kept.

        Raises:
            NotYoursError: the task was never shown to the labeller.
            ChangedError: the answer that is kept is of another version, and says something else.
        """
        texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in (answer, skipped)]
        with self.writing() as run:
            waiting = run("DELETE FROM reserved WHERE number = ? AND labeller = ?", (number, labeller)).rowcount
            given = run(
                "SELECT answer, skipped, changes + 1 FROM answers WHERE number = ? AND labeller = ?", (number, labeller)
            ).fetchone()
            if not waiting and not given:
                raise NotYoursError
            if given and given[2] != version:
                if list(given[:2]) == texts:
                    return
                raise ChangedError
            run(
                """
                INSERT INTO answers (number, labeller, answer, skipped, seconds, time) VALUES (?, ?, ?, ?, ?, ?)
                ON CONFLICT DO UPDATE SET answer = excluded.answer, skipped = excluded.skipped,
                seconds = seconds + excluded.seconds, time = excluded.time, changes = changes + 1
                """,
                (number, labeller, *texts, seconds, time.time()),
            )

    def release(self, labeller: str) -> None:
        """Lets others have the tasks that wait for a labeller, who may still answer them."""
        with self.writing() as run:
            run("UPDATE reserved SET until = 0 WHERE labeller = ?", (labeller,))

    def progress(self, labeller: str, labels_per_prompt: int) -> Progress:
        """How far a labeller is, and all are."""
        answered, skipped = self.read(
            "SELECT count(answer), count(skipped) FROM answers WHERE labeller = ?", (labeller,)
        )[0]
        labels = self.read("SELECT count(answer) FROM answers")[0][0]
        return Progress(answered, skipped, labels, wanted=labels_per_prompt * self.count())

    def answers(self, labeller: str | None = None) -> list[Answer]:
        """All answers by task and labeller, or those of one labeller by time."""
        if labeller is None:
            return self._answers("ORDER BY number, labeller")
        return self._answers("WHERE labeller = ? ORDER BY time, number", labeller)

    def answer(self, number: int, labeller: str) -> Answer | None:
        """What a labeller said of a task."""
        return next(iter(self._answers("WHERE number = ? AND labeller = ?", number, labeller)), None)

    def before(self, number: int, labeller: str) -> int | None:
        """The task that a labeller answered last, or the last before this one if it is answered too."""
        given = self.answer(number, labeller)
        found = self.read(
            "SELECT number FROM answers WHERE labeller = ? AND (time, number) < (?, ?) "
            "ORDER BY time DESC, number DESC LIMIT 1",
            (labeller, given.time if given else math.inf, number),
        )
        return found[0][0] if found else None

    def _answers(self, which: str, *values: Any) -> list[Answer]:
        fields = "SELECT number, labeller, answer, skipped, seconds, time, changes FROM answers "
        return [
            Answer(number, name, answer and json.loads(answer), skipped and json.loads(skipped), *rest)
            for number, name, answer, skipped, *rest in self.read(fields + which, values)
        ]
