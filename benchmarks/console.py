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
        """Starts the next case."""
        self.title = title
        if not self.live:
            print(title, file=sys.stderr, flush=True)

    def say(self, what: str) -> None:
        """Shows what is being done, on a terminal."""
        if self.live:
            print(f"\r\033[K{self.title}: {what}", end="", file=sys.stderr, flush=True)

    def note(self, what: str) -> None:
        """Prints a remark and keeps it, once."""
        if what not in self.notes:
            self.notes.append(what)
            self.clear()
            print(what, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes the line that changes, to make room for output."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
