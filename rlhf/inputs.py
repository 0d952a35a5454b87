"""What a run's input files hold, so that a run that goes on can tell whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INPUTS = {"model", "policy", "reward_model", "value_model", "tokenizer", "data", "demonstrations", "prompts",
          "pretraining_data"}  # fmt: skip
"""The settings that name files or directories to read. What is on the hub, or in memory, is no file."""
SAMPLES, SAMPLE_BYTES = 16, 1 << 16


def fingerprints(settings: Mapping[str, Any]) -> dict[str, str]:
    """A digest for every file or directory that the settings name, under the setting and the path."""
    found = {}
    for name in sorted(INPUTS & settings.keys()):
        values = settings[name] if isinstance(settings[name], list) else [settings[name]]
        for value in values:
            if isinstance(value, str) and Path(value).exists():
                found[f"{name}: {value}"] = digest_of(Path(value))
    return found


def digest_of(path: Path) -> str:
    """Of a file, or of all files of a directory; of a run's directory only its model is an input."""
    if (path / "config.yaml").exists() and (path / "model").is_dir():
        path = path / "model"
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
        whole.update(sampled(file))
    return whole.hexdigest()[:16]


def sampled(file: Path) -> bytes:
    """A small file's content, or pieces from all over a large one: training changes every part of a model's weights."""
    size = file.stat().st_size
    if size <= SAMPLES * SAMPLE_BYTES:
        return file.read_bytes()
    with file.open("rb") as opened:
        pieces = []
        for i in range(SAMPLES):
            opened.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            pieces.append(opened.read(SAMPLE_BYTES))
    return b"".join(pieces)
