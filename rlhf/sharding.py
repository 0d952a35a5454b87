"""Models that are split over the processes by torch's FSDP2: each process holds its part of every weight.

A block's weights are gathered when the block runs and let go of afterwards. All processes must then run a model equally
often, since they gather together; :class:`Passes` sees to that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlhf.batch import Group

if TYPE_CHECKING:
    from rlhf.models import Backbone
    from rlhf.processes import Processes

logger = logging.getLogger(__name__)

SomeModel = TypeVar("SomeModel", bound="Backbone")
Result = TypeVar("Result")


def place(model: SomeModel, sharding: Literal["none", "full"], processes: Processes) -> SomeModel:
    """The model as the setting has it: whole in every process, or split over them.

    Split are each block by itself and, as one more, what is outside of blocks. The output projection is outside, so
    inside ``forward`` all of it is there, as the ``linear_`` ops need it.
    """
    if sharding == "none" or processes.count == 1:
        return model
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "run")
    # An expert may see tokens in one process and none in another, which then has no gradient to exchange.
    sharded: Any = model
    if hasattr(sharded, "set_reduce_scatter_unused_params"):  # in torch 2.13, and not in all releases before
        sharded.set_reduce_scatter_unused_params(True)
    return model


def is_sharded(model: Any) -> bool:
    """Whether :func:`place` has split this model."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process. All of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: Backbone) -> dict[str, Tensor]:
    """All weights of a model, on the CPU in the first process, as its transformers model names them.

    What is tied stays tied. Other processes give their parts and get nothing.
    """
    main = dist.get_rank() == 0
    seen: dict[int, Tensor] = {}
    weights = {}
    for name, tensor in model.model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            found = whole(tensor.detach())
            seen[id(tensor)] = found.cpu() if main else found.new_empty(0)
        weights[name] = seen[id(tensor)]
    return weights if main else {}


class Passes:
    """Any number of passes through a model without gradients, each by ``passes(function, *args)``.

    Nothing is different if the model is not sharded. If it is, a process whose own passes are done takes part in those
    of the others, with a single token, until all are done. ``gathered`` has the processes gather all weights once, if
    there is memory for that in each of them; then each makes its passes alone.
    """

    def __init__(self, model: Backbone, *, gathered: bool = False):
        self.model = model
        self.sharded = is_sharded(model)
        self.gather = gathered and self.sharded and not largest(not fits(model), model.device)

    def __enter__(self) -> Passes:
        if self.gather:
            self._set_gathered(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.gather:
            self._set_gathered(False)
        elif self.sharded and kind is None:
            idle = self.model.lay_out([Group([0], [[0]])])
            while largest(0, self.model.device):
                self.model.run(self.model.hidden, idle, idle.last)

    def __call__(self, function: Callable[..., Result], *args: Any) -> Result:
        """What the function returns, called where the model's weights are."""
        if not self.sharded:
            return function(*args)
        if not self.gather:
            largest(1, self.model.device)
        return self.model.run(function, *args)

    def _set_gathered(self, gathered: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(not gathered, recurse=False)
                if gathered:
                    module.unshard()
                else:
                    module.reshard()


def largest(value: int, device: torch.device) -> int:
    """The largest of the numbers that the processes have."""
    found = torch.tensor(int(value), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def fits(model: Backbone) -> bool:
    """Whether all of a model's weights would take at most half of the memory that is free here."""
    device = model.device
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return size <= free // 2
