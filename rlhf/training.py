"""A run: its directory, metrics, progress, learning rate and checkpoints. What the three trainers share.

    output_dir/
      config.yaml             every setting
      metrics.jsonl           one record per step; tensorboard/ has the same
      checkpoint-000100/      the last complete one, for --resume
      model/                  the result, as from_pretrained reads it
      report.md, *.png        what came out

Two rules make a killed run resume to the same bits. Whatever is random at a step is seeded by that step's number
alone (:meth:`Run.seed_step`, :func:`batch_indices`), so there is no generator state to lose. And a checkpoint is
written under a temporary name, flushed, then renamed: it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase

from rlhf.config import Adam, ConfigError, RunConfig, flatten
from rlhf.models import Backbone, first_line

logger = logging.getLogger(__name__)
console = Console(stderr=True)

# May differ between a run and its resumption: they change where or how often, never what is computed.
FREE_ON_RESUME = {"output_dir", "checkpoint_every", "device"}


class RunError(RuntimeError):
    """A run that cannot start, go on or save itself. The message says what is safe and what to do."""


class Run:
    """One run of one stage. Use as ``for step in run.steps(total): ...`` between ``prepare`` and ``finish``."""

    def __init__(self, stage: str, config: RunConfig, *, resume: bool = False):
        self.stage = stage
        self.config: Any = config  # of the stage's own class, for its functions
        self.directory = Path(config.output_dir)
        self.accelerator = accelerate.Accelerator(
            mixed_precision=config.mixed_precision, cpu=config.device == "cpu", step_scheduler_with_optimizer=False
        )
        self.checkpoint = latest_checkpoint(self.directory) if resume else None
        if self.is_main:
            with describing(f"{self.directory}: cannot be used for output"):
                self._open_directory(resume)
        self.accelerator.wait_for_everyone()

    def _open_directory(self, resume: bool) -> None:
        """Makes the directory, or checks that the run in it is this one."""
        settings = {"stage": self.stage, **flatten(self.config)}
        config_file = self.directory / "config.yaml"
        if config_file.exists():
            if not resume:
                raise RunError(
                    f"{self.directory}: holds a run already; go on with --resume, or choose another output_dir"
                )
            stored = yaml.safe_load(config_file.read_text())
            before = {"stage": stored.pop("stage", None), **flatten_mapping(stored)}
            for name in settings:
                if name not in FREE_ON_RESUME and settings[name] != before.get(name):
                    raise RunError(
                        f"{self.directory}: {name} was {before.get(name)!r} and is now {settings[name]!r}; "
                        "a resumed run must keep its settings"
                    )
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_whole(config_file, yaml.safe_dump({"stage": self.stage, **asdict(self.config)}, sort_keys=False))

    @property
    def device(self) -> torch.device:
        """Where tensors go."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.accelerator.is_main_process

    @property
    def finished(self) -> bool:
        """Whether the run has saved its model already."""
        return (self.directory / "model").exists()

    def prepare(self, *models_and_optimizers: Any, extra: Mapping[str, Any] | None = None) -> list[Any]:
        """Places models and optimizers on their devices and brings them to the checkpoint's state, if there is one.

        ``extra`` maps names to further objects with ``state_dict`` and ``load_state_dict``.
        """
        prepared = [self.accelerator.prepare(item) for item in models_and_optimizers]
        if extra:
            self.accelerator.register_for_checkpointing(*extra.values())
        if self.checkpoint:
            self.accelerator.load_state(str(self.checkpoint))
        self._open_metrics(self.first_step)
        return prepared

    @property
    def first_step(self) -> int:
        """The step to begin with: 0, or the one after the checkpoint's."""
        return int(self.checkpoint.name.removeprefix("checkpoint-")) if self.checkpoint else 0

    def _open_metrics(self, first_step: int) -> None:
        """Opens the metrics for appending, without what a killed run had logged beyond its checkpoint."""
        self.history: list[dict[str, Any]] = []
        if not self.is_main:
            return
        path = self.directory / "metrics.jsonl"
        if path.exists():
            self.history = [record for record in read_metrics(path) if record["step"] < first_step]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in self.history))
        self._metrics = path.open("a")
        self._tensorboard = SummaryWriter(str(self.directory / "tensorboard"), purge_step=first_step)

    def steps(self, total: int, unit: str = "steps") -> Iterator[int]:
        """Counts the steps from the first one to do, with a progress bar, and writes the checkpoints between them."""
        with Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=not self.is_main,
            refresh_per_second=4,
        ) as progress:
            self._bar = progress, progress.add_task(self.stage, total=total, completed=self.first_step, metrics="")
            for step in range(self.first_step, total):
                self.seed_step(step)
                yield step
                progress.advance(self._bar[1])
                if (step + 1) % self.config.checkpoint_every == 0 and step + 1 < total:
                    self.save_checkpoint(step + 1)

    def seed_step(self, step: int) -> None:
        """Seeds everything random in this step, in this process."""
        rank = self.accelerator.process_index
        digest = hashlib.sha256(f"{self.stage}/{self.config.seed}/{step}/{rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def log(self, step: int, metrics: Mapping[str, float], show: Iterable[str]) -> None:
        """Records ``metrics`` and puts those named in ``show`` beside the progress bar."""
        if not self.is_main:
            return
        record = {"step": step, **metrics}
        self.history.append(record)
        with describing(f"{self.directory}: metrics could not be written"):
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        progress, task = self._bar
        progress.update(task, metrics="  ".join(f"{name} {metrics[name]:.3g}" for name in show if name in metrics))

    def save_checkpoint(self, step: int) -> None:
        """Writes ``checkpoint-<step>`` whole, then removes those before it."""
        target = self.directory / f"checkpoint-{step:06d}"
        temporary = target.with_suffix(".tmp")
        previous = latest_checkpoint(self.directory)
        safe = (
            f"the checkpoint of step {previous.name[-6:]} is intact" if previous else "there is no earlier checkpoint"
        )
        with describing(f"{target}: could not be written; {safe}; free some space and go on with --resume", temporary):
            self.accelerator.save_state(str(temporary))
            self._publish(temporary, target)
        if self.is_main:
            for older in set(self.directory.glob("checkpoint-*")) - {target}:
                shutil.rmtree(older)

    def save_model(self, model: Backbone, tokenizer: PreTrainedTokenizerBase, name: str = "model") -> Path:
        """Writes a model under ``name``, whole or not at all, and returns where."""
        target = self.directory / name
        temporary = target.with_name(target.name + ".tmp")
        with describing(
            f"{target}: could not be written; checkpoints are intact; free some space and --resume", temporary
        ):
            if self.is_main:
                model.save(temporary, tokenizer)
            self._publish(temporary, target)
        return target

    def _publish(self, temporary: Path, target: Path) -> None:
        """Makes a finished directory appear under its name at once, and last through a power cut."""
        self.accelerator.wait_for_everyone()
        if self.is_main:
            for path in [*temporary.rglob("*"), temporary]:
                flush(path)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
            flush(target.parent)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Closes the files, and says where everything is."""
        if self.is_main:
            self._metrics.close()
            self._tensorboard.close()
            console.print(
                f"{self.stage}: [bold]{self.directory / 'model'}[/], report in {self.directory / 'report.md'}"
            )


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
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else first_line(error)
        raise RunError(f"{what}: {reason}") from error


def quiet_libraries() -> None:
    """Libraries report every file and every tied weight; what matters of it, we say ourselves."""
    for library in ("accelerate", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def flush(path: Path) -> None:
    """Forces a file or a directory entry onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in a run's directory."""
    found = sorted(path for path in directory.glob("checkpoint-*") if path.suffix != ".tmp")
    return found[-1] if found else None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; the last line may have been cut off by a kill."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def flatten_mapping(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """:func:`rlhf.config.flatten` for a stored config."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten_mapping(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def make_optimizer(model: nn.Module, adam: Adam) -> torch.optim.Optimizer:
    """Adam over a model's parameters."""
    return torch.optim.Adam(
        model.parameters(), lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, fused=True
    )


def optimizer_step(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, adam: Adam, factor: float) -> float:
    """One clipped step at ``factor`` times the peak learning rate. Returns the gradient's norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = adam.learning_rate * factor
    norm = run.accelerator.clip_grad_norm_(model.parameters(), adam.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


@functools.lru_cache(maxsize=16)
def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch number ``epoch`` visits ``count`` examples."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randperm(count, generator=generator).tolist()


def batch_indices(count: int, batch_size: int, step: int, *, seed: int, epochs: int | None = None) -> list[int]:
    """Which of ``count`` examples make up batch number ``step``: a function of its arguments alone.

    Epochs follow one another, each in an order of its own, without end unless ``epochs`` is given: then the last
    batch may be short.
    """
    stop = (step + 1) * batch_size if epochs is None else min((step + 1) * batch_size, epochs * count)
    return [
        permutation(count, seed, position // count)[position % count] for position in range(step * batch_size, stop)
    ]


def hold_out(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits ``range(count)`` into training and held-out indices; at least one held out when ``fraction`` > 0."""
    if not fraction:
        return list(range(count)), []
    order = permutation(count, seed, -1)
    held_out = max(1, round(count * fraction))
    if held_out >= count:
        raise ConfigError(f"held_out_fraction: {fraction} of {count} records leaves none to train on")
    return sorted(order[held_out:]), sorted(order[:held_out])


def accumulate(run: Run, model: nn.Module, parts: Iterable[Any]) -> Iterator[Any]:
    """The parts of one optimizer step, each for a forward and backward pass of its own.

    Gradients add up; processes exchange them once, at the last part.
    """
    parts = list(parts)
    for number, part in enumerate(parts, start=1):
        with run.accelerator.no_sync(model) if number < len(parts) else contextlib.nullcontext():
            yield part


def mine(run: Run, items: list[Any]) -> list[Any]:
    """This process's share of a global batch."""
    return items[run.accelerator.process_index :: run.accelerator.num_processes]


def total(run: Run, value: float | Tensor) -> Tensor:
    """The sum of a number over all processes."""
    return run.accelerator.reduce(torch.as_tensor(value, dtype=torch.float32, device=run.device), reduction="sum")
