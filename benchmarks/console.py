"""Progress and remarks while a benchmark runs."""

from __future__ import annotations

import sys


class Console:
    """Progress and remarks on stderr: one line that changes on a terminal, a line per case elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.notes: list[str] = []
        self.title = ""

    def begin(self, title: str) -> None:
        """The next case."""
        self.title = title
        if not self.live:
            print(title, file=sys.stderr, flush=True)

    def say(self, what: str) -> None:
        """What is being done."""
        if self.live:
            print(f"\r\033[K{self.title}: {what}", end="", file=sys.stderr, flush=True)

    def note(self, what: str) -> None:
        """A remark, once."""
        if what not in self.notes:
            self.notes.append(what)
            self.clear()
            print(what, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Makes room for output."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
