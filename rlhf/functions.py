"""Python functions named in a setting: ``module:function``, as for ``--reward`` and ``--judge``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.fields import type_and_line
from rlhf.settings import ConfigError


def load_function(setting: str, value: Any) -> Callable[..., Any]:
    """The function that ``module:function`` names. Modules of the current directory are found too.

    A function is returned unchanged.

    Raises:
        ConfigError: names the setting; the module or the function is not there, or cannot be imported.
    """
    if callable(value):
        return value
    module, colon, name = str(value).partition(":")
    if not (colon and module and name):
        raise ConfigError(f"{setting}: is {value!r}, must be module:function")
    if module.endswith(".py"):
        dotted = ".".join(Path(module).with_suffix("").parts)
        raise ConfigError(f"{setting}: is {value!r}, must name a module: {dotted}:{name}")
    here = str(Path.cwd())
    if here not in sys.path:  # as for `python -m`; a console script does not look there
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the module is the user's: anything may happen in it
        raise ConfigError(f"{setting}: {value!r} names no Python function: {type_and_line(error)}") from error
    if not callable(function):
        raise ConfigError(f"{setting}: {value!r} is {type(function).__name__}, not a function")
    return function
