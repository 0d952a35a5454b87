"""The processes of a run: on which device each works, its share of the work, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor

from rlhf.fields import first_line
from rlhf.settings import ConfigError

Item = TypeVar("Item")


class Processes:
    """Those that a launcher such as torchrun started, of which this is one; or this one alone.

    Raises:
        ConfigError: a device that is not there, or a precision that it does not have; or the launcher started more
            processes than can take part.
    """

    def __init__(self, device: Any, mixed_precision: Literal["no", "bf16", "fp16"] = "no"):
        self.accelerator = make_accelerator(device, mixed_precision)
        self.count: int = self.accelerator.num_processes
        self.number: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process
        """Whether this process writes files and shows progress."""

    @property
    def device(self) -> torch.device:
        """Where this process has its tensors."""
        return self.accelerator.device

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of what all have in common."""
        return list(items[self.number :: self.count])

    def joined(self, shares: Sequence[Item]) -> list[Item]:
        """All items again, in order, from what each process made of its :meth:`share`."""
        if self.count == 1:
            return list(shares)
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, list(shares))
        whole: list[Any] = [None] * sum(map(len, found))
        for number, items in enumerate(found):
            whole[number :: self.count] = items
        return whole

    def sum(self, value: float | Tensor) -> Tensor:
        """The sum of a number over all processes, float32 on the device."""
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        return self.accelerator.reduce(value, reduction="sum")


def make_accelerator(name: Any, mixed_precision: Literal["no", "bf16", "fp16"]) -> accelerate.Accelerator:
    """Devices, processes and precision, as the launcher and the settings have them."""
    device = find_device(name)
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ConfigError("mixed_precision: is 'fp16', which CPUs have not; bf16 runs on them")
    # accelerate keeps devices and precision for the whole process; a second run in it may have others.
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    try:
        accelerator = accelerate.Accelerator(
            mixed_precision=mixed_precision, cpu=device.type == "cpu", step_scheduler_with_optimizer=False
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the processes that were started can't be joined: {first_line(error)}") from error
    if name and device.index not in (None, accelerator.device.index):
        raise ConfigError(
            f"device: is {name!r}, but this process runs on {accelerator.device}; CUDA_VISIBLE_DEVICES chooses the GPUs"
        )
    launched, taking_part = int(os.environ.get("WORLD_SIZE", 1)), accelerator.num_processes
    if launched != taking_part:  # each of them would be a run of its own
        raise ConfigError(f"the launcher started {launched} processes, of which {taking_part} can take part")
    return accelerator


def another_has_ended(error: Exception) -> bool:
    """Whether an error is that of waiting for a process that is no more."""
    if not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def find_device(name: Any) -> torch.device:
    """The device of a setting, or the best there is.

    Raises:
        ConfigError: torch knows no such device, or sees none here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: is {name!r}, must be cpu, cuda or another device of torch") from error
    module: Any = getattr(torch, device.type, None)
    count = module.device_count() if device.type != "cpu" and hasattr(module, "device_count") else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ConfigError(f"device: is {name!r}, but torch {torch.__version__} sees {count} devices of that type here")
    return device
