"""OpenRLHF imported where there is no GPU, without what it needs only there."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules under these names."""

    PACKAGES = ("deepspeed", "flash_attn", "vllm")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Not of flash_attn.ops, whose lack OpenRLHF copes with."""
        if name.partition(".")[0] in self.PACKAGES and name != "flash_attn.ops":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """A module that has every name."""
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: mock.MagicMock()  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Imports within find stubs, which are gone afterwards: other libraries ask whether they are installed."""
    stubs = Stubs()
    sys.meta_path.append(stubs)  # after the finders of what is installed
    try:
        yield
    finally:
        sys.meta_path.remove(stubs)
        for name in [name for name, module in sys.modules.items() if getattr(module, "__loader__", None) is stubs]:
            del sys.modules[name]
