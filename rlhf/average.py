"""The moving average of a policy's weights (Ouyang et al. 2022, appendix C.4): it is what PPO keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rlhf.sharding import local


class MovingAverage:
    """average ← decay · average + (1 − decay) · weights, of those weights of a model that are trained."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are now."""
        average, weights = (list(map(local, tensors.values())) for tensors in (self.average, self.weights))
        torch._foreach_lerp_(average, weights, 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Has the model hold the average, for as long as it is saved."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.average.items():
            before = local(average).clone()
            local(average).copy_(local(self.weights[name]))
            local(self.weights[name]).copy_(before)

    def state_dict(self) -> dict[str, Tensor]:
        """For checkpoints."""
        return self.average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        for name, tensor in state.items():
            self.average[name].copy_(tensor)
