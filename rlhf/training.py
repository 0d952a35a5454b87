"""What the three trainers share: a run with its directory, metrics, progress, learning rate and checkpoints.

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
import errno
import functools
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import transformers
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase

from rlhf import checkpoints
from rlhf.batch import Batch, Group
from rlhf.checkpoints import RunError, describing, flush
from rlhf.config import Adam, RunConfig
from rlhf.files import write_whole
from rlhf.inputs import fingerprints
from rlhf.liger import use_liger
from rlhf.loading import ModelSource
from rlhf.lora import add_adapter
from rlhf.memory import freeze, recompute_blocks
from rlhf.models import Backbone, unwrap
from rlhf.processes import Processes
from rlhf.settings import ConfigError, as_plain, flatten
from rlhf.sharding import is_sharded, largest, local, place, whole, whole_weights

logger = logging.getLogger(__name__)
console = Console(stderr=True)

# Settings that may differ when a run is resumed: they say where it runs and how often it saves, not what it computes.
FREE_ON_RESUME = {"output_dir", "checkpoint_every", "device", "sharding"}
# These may differ too, although they change what is computed: a run that diverged can only go on with lower rates.
LEARNING_RATES = {"adam.learning_rate", "value_adam.learning_rate"}


SomeModel = TypeVar("SomeModel", bound=Backbone)


class Example(Protocol):
    """What a model is trained on."""

    @property
    def group(self) -> Group:
        """Its prompt and responses."""

    @property
    def idle(self) -> Any:
        """An example of the same kind with nothing to learn, for a process that only takes part."""


SomeExample = TypeVar("SomeExample", bound=Example)


class Run:
    """One run of one stage. Use as ``for step in run.steps(total): ...`` between ``prepare`` and ``close``."""

    def __init__(self, stage: str, config: RunConfig, *, resume: bool = False):
        self.stage = stage
        self.config: Any = config  # of the stage's own class, for its functions
        self.settings = {"stage": stage, **as_plain(config)}
        self.directory = Path(config.output_dir)
        self.step = 0
        self.processes = Processes(config.device, config.mixed_precision)
        self.accelerator = self.processes.accelerator
        if self.is_main:
            with describing(f"{self.directory}: cannot be used for output"):
                self._check_directory(resume)
        self.accelerator.wait_for_everyone()
        self.checkpoint = checkpoints.latest(self.directory) if resume else None

    def _check_directory(self, resume: bool) -> None:
        """Raises if the directory cannot be written to, or holds another run or one that is not to be resumed.

        Nothing is written before the models are loaded, so that an error until then leaves nothing behind.
        """
        config_file = self.directory / "config.yaml"
        above = next(path for path in (self.directory, *self.directory.absolute().parents) if path.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "", str(above))
        if not os.access(above, os.W_OK):
            raise PermissionError(errno.EACCES, "", str(above))
        if not holds_run(self.directory):
            if there := foreign(self.directory):
                raise RunError(
                    f"{self.directory}: holds {there[0].name}, and no run that it is of; choose another output_dir"
                )
            if resume:
                logger.info("%s: holds no run to resume, so this one starts at the beginning", self.directory)
            return
        if not resume:
            raise RunError(f"{self.directory}: holds a run already; go on with --resume, or choose another output_dir")
        before = flatten(yaml.safe_load(config_file.read_text()))
        for name, value in flatten(self.settings).items():
            if name in FREE_ON_RESUME or value == before.get(name):
                continue
            if name not in LEARNING_RATES:
                raise RunError(
                    f"{self.directory}: {name} was {before.get(name)!r} and is now {value!r}; "
                    "a resumed run must keep its settings"
                )
            logger.info("%s was %g and is %g from here on", name, before[name], value)
        if self.finished:
            console.print(f"{self.stage}: is finished already: [bold]{self.directory / 'model'}[/]")
        elif self._inputs_file.exists():
            self._check_inputs()

    def _check_inputs(self) -> None:
        """Raises if a file that the run has read holds something else now."""
        now = fingerprints(self.settings)
        for name, digest in yaml.safe_load(self._inputs_file.read_text()).items():
            if now.get(name, digest) != digest:
                raise RunError(
                    f"{self.directory}: {name} has changed since the run began; a resumed run must keep its inputs"
                )

    def _open_directory(self) -> None:
        """Makes the directory, with the settings in it, and clears away what a kill left half written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in written(self.directory):
            if leftover.suffix == ".tmp":
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_whole(self.directory / "config.yaml", yaml.safe_dump(self.settings, sort_keys=False))
        if not self._inputs_file.exists():
            write_whole(self._inputs_file, yaml.safe_dump(fingerprints(self.settings)))

    @property
    def _inputs_file(self) -> Path:
        return self.directory / "inputs.yaml"

    @property
    def device(self) -> torch.device:
        """Where tensors go."""
        return self.processes.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.processes.is_main

    @property
    def finished(self) -> bool:
        """Whether the run has saved its model already."""
        return (self.directory / "model").exists()

    def place_frozen(self, model: SomeModel) -> SomeModel:
        """A model that is not trained, as the settings have such: in their precision, its weights split or whole."""
        if self.config.liger:
            use_liger(model)
        frozen = freeze(model, getattr(torch, self.config.frozen_dtype))
        return place(frozen, self.config.sharding, self.processes)

    def place_trained(self, model: SomeModel, source: ModelSource, *, merged: bool | None = None) -> SomeModel:
        """A model from ``source`` that is trained, as the settings have such, with an adapter if they ask for one.

        ``merged`` is what :meth:`save_model` is given.
        """
        if self.config.liger:
            use_liger(model)
        if self.config.lora.rank:
            freeze(model, getattr(torch, self.config.frozen_dtype))
            torch.manual_seed(self.config.seed)
            add_adapter(model, self.config.lora, source, merged=self._merged(merged))
        if self.config.gradient_checkpointing:
            recompute_blocks(model)
        return place(model, self.config.sharding, self.processes)

    def prepare(self, *trained: tuple[Backbone, torch.optim.Optimizer], also: Sequence[Any] = ()) -> list[Any]:
        """Models and optimizers, ready for training on all processes and in the checkpoint's state if there is one.

        ``also``: further objects with ``state_dict`` and ``load_state_dict`` that belong in the checkpoint.
        """
        if self.is_main:
            with describing(f"{self.directory}: cannot be used for output"):
                self._open_directory()
        self._state: dict[str, Any] = {f"trained_{i}": checkpoints.Trained(*pair) for i, pair in enumerate(trained)}
        self._state |= {f"also_{i}": item for i, item in enumerate(also)}
        prepared = []
        for model, optimizer in trained:
            prepared.append(model if is_sharded(model) else self.accelerator.prepare(model))
            prepared.append(self.accelerator.prepare(optimizer))
        if self.accelerator.scaler:
            self._state["loss_scale"] = self.accelerator.scaler
        if self.checkpoint:
            with describing(f"{self.checkpoint}: could not be read"):
                checkpoints.read(self._state, self.checkpoint)
        self._open_metrics(self.first_step)
        return prepared

    @property
    def first_step(self) -> int:
        """The step to begin with: 0, or the one after the checkpoint's."""
        return checkpoints.step_of(self.checkpoint) if self.checkpoint else 0

    def _open_metrics(self, first_step: int) -> None:
        """Opens the metrics for appending. Drops what was logged after the checkpoint, since those steps run again."""
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
            # What there is now (modules, data, the libraries' own objects) lives as long as the run. The garbage
            # collector need not walk through it in every step, which takes a few percent of a small model's time.
            gc.freeze()
            try:
                for step in range(self.first_step, total):
                    self.step = step
                    self.seed_step(step)
                    yield step
                    progress.advance(self._bar[1])
                    if step == self.first_step or step % self.config.checkpoint_every == 0:
                        self._remove_older_checkpoints()
                    if (step + 1) % self.config.checkpoint_every == 0 and step + 1 < total:
                        self.save_checkpoint(step + 1)
            finally:
                gc.unfreeze()

    def seed_step(self, step: int) -> None:
        """Seeds everything random in this step, in this process."""
        rank = self.processes.number
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
        """Writes ``checkpoint-<step>`` whole. Older ones are removed only after the next step has run without error."""
        target = self.directory / checkpoints.name_of_step(step)
        temporary = target.with_suffix(".tmp")
        with describing(
            f"{target}: could not be written; {self.last_checkpoint()}; free some space and go on with --resume",
            temporary,
        ):
            checkpoints.write(self._state, temporary)
            self._publish(temporary, target)

    def last_checkpoint(self) -> str:
        """For error messages: from which checkpoint a run that stops here can go on."""
        found = checkpoints.latest(self.directory)
        return f"{found.name} is intact" if found else "there is no checkpoint yet"

    def _remove_older_checkpoints(self) -> None:
        """Removes all checkpoints but the newest."""
        if self.is_main:
            for older in checkpoints.complete(self.directory)[:-1]:
                shutil.rmtree(older)

    def require_finite(self, **quantities: float) -> None:
        """Stops the run if a quantity is NaN or infinite, since further steps would only spread it.

        Raises:
            RunError: names the quantity, the last good checkpoint and what to try.
        """
        bad = [(name.replace("_", " "), value) for name, value in quantities.items() if not math.isfinite(value)]
        if not bad:
            return
        found = checkpoints.complete(self.directory)
        # If the very next step after a checkpoint fails, the checkpoint is bad: its weights may be finite but huge.
        if found and found[-1].name == checkpoints.name_of_step(self.step):
            if self.is_main:
                shutil.rmtree(found[-1])
            found.pop()
        again = "go on from there" if found else "start again"
        rates = " or ".join(f"--{name}" for name in flatten(self.settings) if name in LEARNING_RATES)
        raise RunError(
            f"step {self.step}: the {bad[0][0]} is {bad[0][1]}; {self.last_checkpoint()}. With a lower {rates}, "
            f"--resume {self.directory} would {again}"
        )

    def save_model(
        self, model: Backbone, tokenizer: PreTrainedTokenizerBase, name: str = "model", *, merged: bool | None = None
    ) -> Path:
        """Writes a model under ``name``, whole or not at all, and returns where.

        Whether an adapter is ``merged`` is for the settings to say if it isn't given.
        """
        size = sum(float(local(parameter.detach()).abs().sum()) for parameter in model.parameters())
        self.require_finite(sum_of_the_trained_weights=self.processes.sum(size).item())
        target = self.directory / name
        temporary = target.with_name(target.name + ".tmp")
        with describing(
            f"{target}: could not be written; checkpoints are intact; free some space and --resume", temporary
        ):
            weights = whole_weights(model) if is_sharded(model) else None  # all processes give their parts
            if self.is_main:
                model.save(temporary, tokenizer, weights, merged=self._merged(merged))
            self._publish(temporary, target)
        return target

    def _merged(self, merged: bool | None) -> bool:
        return bool(self.config.lora.merge if merged is None else merged)

    def _publish(self, temporary: Path, target: Path) -> None:
        """Gives a complete directory its final name. It is flushed before that, so that it survives a power cut."""
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


def quiet_libraries() -> None:
    """Silences libraries, which report every file and every tied weight. We report what matters of it ourselves."""
    for library in ("accelerate", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


WRITTEN = re.compile(
    r"(config\.yaml|inputs\.yaml|metrics\.jsonl|report\.md|curves\.png|tensorboard|model|value|(checkpoint|iteration|step)-\d{6,})"
    r"(\.tmp)?"
)
"""The names of what a run writes into its directory, and may remove there."""


def written(directory: Path) -> list[Path]:
    """What is in a directory under a name of :data:`WRITTEN`."""
    return sorted(path for path in directory.glob("*") if WRITTEN.fullmatch(path.name))


def foreign(directory: Path) -> list[Path]:
    """What a run would overwrite in a directory that has none. A start that was killed may leave half its settings."""
    return [path for path in written(directory) if path.name != "config.yaml.tmp"]


def holds_run(directory: Path) -> bool:
    """Whether a run was begun there, finished or not."""
    return (directory / "config.yaml").exists()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; the last line may have been cut off by a kill."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def make_optimizer(model: nn.Module, adam: Adam) -> torch.optim.Optimizer:
    """Adam over the parameters of a model that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, fused=True)


def optimizer_step(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, adam: Adam, factor: float) -> float:
    """One clipped step at ``factor`` times the peak learning rate. Returns the gradient's norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = adam.learning_rate * factor
    norm = float(whole(run.accelerator.clip_grad_norm_(model.parameters(), adam.max_grad_norm)))
    scaler = run.accelerator.scaler
    # In fp16 the loss scale is found by trying: a step whose gradients overflow is skipped, and the scale is halved. So
    # an infinite norm is an error only without a scale, or once the scale is below 1.
    if scaler is None or scaler.get_scale() < 1:
        run.require_finite(gradient_norm=norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@functools.lru_cache(maxsize=16)
def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch number ``epoch`` visits ``count`` examples."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randperm(count, generator=generator).tolist()


def batch_indices(count: int, batch_size: int, step: int, *, seed: int, epochs: int | None = None) -> list[int]:
    """Which of ``count`` examples make up batch number ``step``. The result depends on the arguments alone.

    Epochs follow one another, each in an order of its own. They never end unless ``epochs`` is given; then the last
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


def accumulate(
    run: Run, model: nn.Module, examples: Sequence[SomeExample]
) -> Iterator[tuple[list[SomeExample], Batch]]:
    """The examples of one optimizer step in parts of ``tokens_per_forward``, each with its batch.

    Every part gets a forward pass and a :func:`backward` of its own. Gradients add up; processes exchange them once,
    at the last part. Those of a sharded model exchange them with every part, so there all processes have equally many.
    """
    inner: Backbone = unwrap(model)
    indices = inner.parts([example.group for example in examples], run.config.tokens_per_forward)
    parts = [[examples[i] for i in part] for part in indices]
    sharded = is_sharded(inner)
    if sharded:
        parts += [[examples[0].idle]] * (largest(len(parts), run.device) - len(parts))
    for number, part in enumerate(parts, start=1):
        waits = not sharded and number < len(parts)
        with run.accelerator.no_sync(model) if waits else contextlib.nullcontext():
            yield part, inner.lay_out([example.group for example in part])


def backward(run: Run, loss: Tensor, share: float) -> None:
    """Adds the gradient of ``share * loss``. The sum of these over all parts and processes is the step's loss."""
    # DDP and FSDP average gradients over processes, but their sum is needed.
    run.accelerator.backward(loss * (share * run.processes.count))
