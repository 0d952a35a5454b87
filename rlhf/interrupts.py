"""Ctrl-C while libraries are being imported: a KeyboardInterrupt there may be swallowed, or become a traceback."""

from __future__ import annotations

import os
import signal
from typing import Any


def end_at_once(*_: Any) -> None:
    """Ends the program at once. That is safe, since nothing has been started that could be left half done."""
    os.write(2, b"rlhf: interrupted\n")
    os._exit(130)


def hold_off() -> None:
    """From here on Ctrl-C ends the program at once, unless the program was started with Ctrl-C ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def allow() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
