"""Checkpoints: what of a run's state is on the disk, whole or not at all.

torch writes them (``torch.distributed.checkpoint``): each process its part, and whoever reads them takes what it needs,
so a run may go on with another number of processes than it had.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from rlhf.errors import UserError
from rlhf.fields import first_line
from rlhf.processes import another_has_ended

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Weights that are not trained are read from where they were read before."""


class RunError(UserError, RuntimeError):
    """A run that cannot start, go on or save itself. The message says what is safe and what to do."""

    status = 1


class Trained:
    """A model that is trained and its optimizer, as one entry of a checkpoint."""

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Weights, and what the optimizer knows of each, under the weights' names."""
        return {
            "weights": get_model_state_dict(self.model, options=TRAINED),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=TRAINED),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        set_model_state_dict(self.model, state["weights"], options=TRAINED)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=TRAINED)


def write(state: Mapping[str, Any], directory: Path) -> None:
    """Writes objects with a ``state_dict`` into a directory. All processes call this together."""
    with _quietly():
        dcp.save(dict(state), checkpoint_id=directory)


def read(state: Mapping[str, Any], directory: Path) -> None:
    """Brings the objects to the state that was written."""
    with _quietly():
        dcp.load(dict(state), checkpoint_id=directory)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without a warning that a single process is one. What failed in any process is raised in all."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from error


def name_of_step(step: int) -> str:
    """The directory of the checkpoint from which ``step`` goes on."""
    return f"checkpoint-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step that goes on from a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints in a run's directory, oldest first. What others call a checkpoint is none."""
    found = (path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name))
    return sorted(found, key=step_of)


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint in a run's directory."""
    found = complete(directory)
    return found[-1] if found else None


@contextlib.contextmanager
def describing(what: str, half_written: Path | None = None) -> Iterator[None]:
    """Turns whatever goes wrong inside into a :class:`RunError` of one line, and removes what was half written."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        if half_written:
            shutil.rmtree(half_written, ignore_errors=True)
        if another_has_ended(error):
            raise
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else first_line(error)
        raise RunError(f"{what}: {reason}") from error


def flush(path: Path) -> None:
    """Forces a file or a directory entry onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
