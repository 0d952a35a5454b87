"""The build backend for pip and uv: setuptools', but it asks for torch where there is none to build against.

The kernels need only torch's headers, and use its stable ABI. So any torch from :data:`OLDEST_TORCH` on gives the same
libraries, and these run with every such torch.
"""

from __future__ import annotations

import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

OLDEST_TORCH = "2.10"


def version_of(torch_folder: Path) -> tuple[str, bool]:
    """The version of the torch in this folder, and whether it has CUDA: read, since importing takes seconds."""
    said = (torch_folder / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = ['\"](.+)['\"]", said, re.MULTILINE)
    return (version[1] if version else "0"), bool(re.search(r"^cuda\b.*= ['\"]", said, re.MULTILINE))


def is_new_enough(version: str) -> bool:
    """Whether a torch of this version has the stable ABI that the kernels use."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) >= tuple(map(int, OLDEST_TORCH.split(".")))


def _torch_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parent
    # pip hides the environment's packages from an isolated build, but not the interpreter, which knows where they are.
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()):
        yield Path(folder) / "torch"
    settings = Path(sys.prefix) / "pyvenv.cfg"
    if settings.exists() and re.search(r"include-system-site-packages\s*=\s*true", settings.read_text(), re.IGNORECASE):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        for name in ("purelib", "platlib"):
            yield Path(sysconfig.get_path(name, vars=base)) / "torch"


def find_torch() -> Path | None:
    """The folder of the torch to build against: one that the build can import, else the environment's.

    None if there is none. If every torch is too old, one of these is returned, so that the error can name its version.
    """
    found = [folder for folder in _torch_folders() if (folder / "include" / "torch" / "csrc").is_dir()]
    return next((folder for folder in found if is_new_enough(version_of(folder)[0])), found[0] if found else None)


def _with_torch(requires: list[str]) -> list[str]:
    folder = find_torch()
    has_one = folder is not None and is_new_enough(version_of(folder)[0])
    return requires if has_one else [*requires, f"torch>={OLDEST_TORCH}"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What a build needs: also torch, if neither the build nor the environment has one that is new enough."""
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for ``pip install -e``."""
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
