"""How functions of another library are replaced, counted, and put back."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self


class ChangedFunctionError(RuntimeError):
    """A function of the other library is not the one that was replaced when this was written."""


class Target(NamedTuple):
    """A function of another library that one of ours can replace."""

    place: Any
    """The module that has it, or the class whose method it is."""
    name: str
    by: str
    """The op that does its work."""
    function: Callable[..., Any]
    """What runs in its place, with the same arguments. For calls that it doesn't serve it returns NotImplemented."""
    tried: dict[str, str]
    """The releases it was tried in, by the digest of the source."""
    source: Any = None
    """Whose source that is, where it isn't the function's own: the class that a method belongs to."""

    @property
    def path(self) -> str:
        """Where it is: ``trl.trainer.utils.selective_log_softmax``."""
        where = self.place.__name__
        return (
            f"{self.place.__module__}.{where}.{self.name}" if isinstance(self.place, type) else f"{where}.{self.name}"
        )

    def check(self, version: str) -> None:
        """Checks that it is the function of a release tried; ``version`` is the one installed.

        Raises:
            ChangedFunctionError: names the function, its digest and the releases tried.
        """
        function = self.source or getattr(self.place, self.name)
        digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
        if digest not in self.tried:
            raise ChangedFunctionError(
                f"{function.__module__}.{function.__qualname__} (digest {digest}) in release {version} is not the "
                f"function of the releases tried: {', '.join(sorted(set(self.tried.values())))}"
            )


class Replacement:
    """A function of another library while ours is in its place."""

    def __init__(self, target: Target):
        self.target = target
        self.calls = 0
        self.in_place = True
        self.original = getattr(target.place, target.name)
        self.own = vars(target.place).get(target.name)  # None: it is inherited

        @functools.wraps(self.original)
        def run(*args: Any, **options: Any) -> Any:
            result = target.function(*args, **options)
            if result is NotImplemented:
                return self.original(*args, **options)
            self.calls += 1
            return result

        # A class method is called without an instance.
        self.ours: Any = staticmethod(run) if inspect.ismethod(self.original) else run
        self._put(self.original, self.ours)

    def undo(self) -> None:
        """Puts the function back."""
        if self.in_place:
            self._put(self.ours, self.own)
            self.in_place = False

    def _put(self, old: Any, new: Any) -> None:
        """Puts a method into its class, or a function wherever the library has it: by another name, in a registry."""
        target = self.target
        if isinstance(target.place, type):
            if new is None:
                delattr(target.place, target.name)
            else:
                setattr(target.place, target.name, new)
            return
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] == target.place.__name__.partition(".")[0]:
                for name, value in list(vars(module).items()):
                    if value is old:
                        setattr(module, name, new)
                    elif type(value) is dict and name.isupper():
                        value.update({key: new for key, entry in value.items() if entry is old})


@dataclass
class Patch:
    """What was replaced, and what was left alone. As a context manager it puts back at its end what it replaced."""

    library: str
    version: str
    replaced: list[Replacement]
    left_alone: dict[str, str]
    """Functions that are like ours but not the same, and how they differ."""
    outer: bool = True
    """Whether nothing was replaced before. The end of a block inside another patch puts nothing back."""

    def __str__(self) -> str:
        lines = [f"rlhf_kernels in {self.library} {self.version}:"]
        lines += [f"  {r.target.path} -> {r.target.by}, {r.calls} calls" for r in self.replaced]
        lines += [f"  {name}: left alone, {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)

    @property
    def calls(self) -> dict[str, int]:
        """How often ours ran, by function. What ours doesn't serve goes to the library's own, and isn't counted."""
        return {r.target.path: r.calls for r in self.replaced if r.calls}

    def unpatch(self) -> None:
        """Puts everything back."""
        for replacement in self.replaced:
            replacement.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.outer:
            self.unpatch()


class Integration:
    """Our functions for those of a library. ``find`` looks up what to replace, and says what to leave alone and why."""

    def __init__(self, library: str, find: Callable[[], tuple[list[Target], dict[str, str]]]):
        self.library = library
        self.find = find
        self.in_force: Patch | None = None

    def patch(self) -> Patch:
        """Replaces the library's functions in this process, until :meth:`unpatch` or the end of a ``with`` block of it.

        Returns:
            What was replaced and how often each ran, and what was left alone and why; ``print`` shows it, also after
            everything was put back.

        Raises:
            ImportError: the library is not installed.
            ChangedFunctionError: a function is not that of a release tried; nothing was replaced then.
        """
        if self.in_force is not None and any(replacement.in_place for replacement in self.in_force.replaced):
            return replace(self.in_force, outer=False)
        targets, left_alone = self.find()
        version = importlib.metadata.version(self.library)
        for target in targets:
            target.check(version)
        self.in_force = Patch(self.library, version, [Replacement(target) for target in targets], left_alone)
        return self.in_force

    def unpatch(self) -> None:
        """Puts the library's own functions back."""
        if self.in_force is not None:
            self.in_force.unpatch()
