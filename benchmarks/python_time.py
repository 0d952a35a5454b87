"""How long a call of each small op takes before and after its kernel: with kernels that do nothing, on one thread.

    python benchmarks/python_time.py

On a GPU this is most of what a call keeps its caller for. Inputs are tiny, and nothing requires a gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import rlhf_kernels as k
from rlhf_kernels import registration

CALLS, ROUNDS = 2000, 15
real = registration.implementation


def calls() -> dict[str, Callable[[], object]]:
    """A call of every small op, with float masks."""
    a, b, c = torch.randn(3, 2, 4)
    mask, scores = torch.ones(2, 4), torch.randn(2)
    logits, index, ranks = torch.randn(8, 16), torch.randint(0, 16, (8,)), torch.arange(8).view(2, 4)
    return {
        "selective_log_softmax": lambda: k.selective_log_softmax(logits, index),
        "sample_tokens": lambda: k.sample_tokens(logits, seed=1, stream=index, step=3),
        "kl_penalty": lambda: k.kl_penalty(a, b, mask),
        "kl_shaped_rewards": lambda: k.kl_shaped_rewards(scores, a, b, mask, beta=0.1),
        "masked_gae": lambda: k.masked_gae(a, b, mask),
        "ppo_advantages": lambda: k.ppo_advantages(scores, a, b, c, mask, beta=0.1),
        "ppo_policy_loss": lambda: k.ppo_policy_loss(a, b, c, mask),
        "ppo_value_loss": lambda: k.ppo_value_loss(a, b, c, mask),
        "pairwise_ranking_loss": lambda: k.pairwise_ranking_loss(a, ranks),
    }


def microseconds(call: Callable[[], object]) -> float:
    """Of one call: the best of several rounds, since others use the machine too."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return min(times)


def main() -> None:
    """Prints a line per op."""
    torch.set_num_threads(1)
    table = Table("op", "whole call, µs", "without its kernel, µs")
    for name, call in calls().items():
        whole, results = microseconds(call), dict[str, Any]()

        def recorded(backend: str, op: str, results: dict[str, Any] = results) -> Callable[..., Any]:
            return lambda *inputs: results.setdefault(op, real(backend, op)(*inputs))

        with mock.patch.object(registration, "implementation", recorded):
            call()
        (result,) = results.values()
        with mock.patch.object(registration, "implementation", lambda *_, result=result: lambda *_: result):
            table.add_row(name, f"{whole:.1f}", f"{microseconds(call):.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
