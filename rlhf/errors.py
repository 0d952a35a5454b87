"""What all errors have in common that a user can mend."""

from __future__ import annotations

from typing import ClassVar


class UserError(Exception):
    """What a user can mend; the message is one line that says so. The command prints it and ends with ``status``."""

    status: ClassVar[int] = 2
