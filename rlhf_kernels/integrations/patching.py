"""How functions of another library are replaced, counted, and put back."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class ChangedFunctionError(RuntimeError):
    """A function of the other library is not the one that was replaced when this was written."""


@dataclass
class Replacement:
    """One function of another library, and what runs in its place."""

    name: str
    """Where it is: ``trl.trainer.utils.selective_log_softmax``."""
    by: str
    """The op that does its work."""
    original: Any
    replacement: Any
    owner: type | None = None
    """The class whose method it is, if it is one."""
    calls: int = 0
    """How often ours ran. What ours doesn't serve goes to the original, and isn't counted."""


@dataclass
class Patch:
    """What :func:`patch` replaced, and what it left alone. As a context manager it puts everything back at its end."""

    library: str
    version: str
    replaced: list[Replacement] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    """Functions that are like ours but not the same, and how they differ."""

    def __str__(self) -> str:
        lines = [f"rlhf_kernels in {self.library} {self.version}:"]
        lines += [f"  {r.name} -> {r.by}, {r.calls} calls" for r in self.replaced]
        lines += [f"  {name}: left alone, {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)

    def replace(self, place: Any, name: str, by: str, make: Callable[[Replacement], Any]) -> None:
        """Replaces a module's function or class, or a class's method.

        A function is replaced wherever the library has it: where it was imported by name, and in registries.
        """
        original = getattr(place, name)
        is_method = isinstance(place, type)
        path = f"{place.__module__}.{place.__qualname__}" if is_method else place.__name__
        replacement = Replacement(f"{path}.{name}", by, original, None, place if is_method else None)
        replacement.replacement = make(replacement)
        self.replaced.append(replacement)
        self._put(replacement, original, replacement.replacement)

    def unpatch(self) -> None:
        """Puts everything back."""
        while self.replaced:
            replacement = self.replaced.pop()
            self._put(replacement, replacement.replacement, replacement.original)

    def _put(self, replacement: Replacement, old: Any, new: Any) -> None:
        if replacement.owner is not None:
            setattr(replacement.owner, replacement.name.rpartition(".")[2], new)
            return
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] == self.library:
                for name, value in list(vars(module).items()):
                    if value is old:
                        setattr(module, name, new)
                    elif type(value) is dict and name.isupper():
                        value.update({key: new for key, entry in value.items() if entry is old})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()


def counted(replacement: Replacement, function: Callable[..., Any], serves: Callable[..., bool]) -> Callable[..., Any]:
    """The function for calls that it serves, and the original for the others."""

    @functools.wraps(replacement.original)
    def run(*args: Any, **options: Any) -> Any:
        if not serves(*args, **options):
            return replacement.original(*args, **options)
        replacement.calls += 1
        return function(*args, **options)

    return run


def check_source(function: Any, known: dict[str, str], version: str) -> None:
    """Checks that a function is one that was replaced in a release tried.

    Args:
        function: of the other library.
        known: the releases tried, by the digest of the function's source in them.
        version: the release that is installed.

    Raises:
        ChangedFunctionError: names the function, its digest and the releases tried.
    """
    digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    if digest not in known:
        raise ChangedFunctionError(
            f"{function.__module__}.{function.__qualname__} (digest {digest}) in release {version} is not the function "
            f"of the releases tried: {', '.join(sorted(set(known.values())))}"
        )
