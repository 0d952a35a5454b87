"""One call of every op, as (function, tensors, options), for tests that hold all of them to one contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as k
from rlhf_kernels.backends import emulated
from rlhf_kernels.ops import OPS


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The native ops that a call makes, with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rlhf_kernels":
            copies = tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)
            self.seen.append((function, copies))
        return function(*args, **(kwargs or {}))


class Call(NamedTuple):
    """``function(**tensors, **options)``, and the names of the tensors that gradients are taken in."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    variables: tuple[str, ...] = ()
    options: dict[str, Any] = MappingProxyType({})

    def run(self, **replaced: Tensor) -> list[Tensor]:
        """Every result, then every gradient of the sum of the differentiable ones."""
        tensors = self.tensors | replaced
        # detach makes new leaves, with the strides under test.
        tensors = {n: x.detach().requires_grad_(n in self.variables) for n, x in tensors.items()}
        results = self.function(**tensors, **self.options)
        results = list(results) if isinstance(results, tuple) else [results]
        flat = [y for x in results for y in (x.values() if isinstance(x, dict) else [x])]
        total = sum((i + 1) * x.sum() for i, x in enumerate(flat) if x.requires_grad)
        variables = [tensors[n] for n in self.variables]
        gradients = torch.autograd.grad(total, variables) if variables else ()
        return [x.detach() for x in (*flat, *gradients)]


def calls(rows: int = 6, length: int = 9, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """The calls by name. The default sizes are no multiples of a vector's, so that kernels have remainders."""
    generator = torch.Generator("cpu").manual_seed(rows * 1000 + length)

    device = torch.get_default_device()

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    def randint(limit: int, *shape: int) -> Tensor:
        return torch.randint(0, limit, shape, generator=generator, device="cpu").to(device)

    mask = (torch.rand(rows, length, generator=generator, device="cpu") < 0.7).to(device)
    vocabulary, depth = 301, 37
    logits = {"logits": 3 * randn(rows, length, vocabulary)}
    index = {"index": randint(vocabulary, rows, length)}
    linear = {"hidden": randn(rows, length, depth), "weight": randn(vocabulary, depth) / 4}
    bias = {"bias": randn(vocabulary) / 4}
    tokens = {"logprobs": randn(rows, length), "old_logprobs": randn(rows, length), "advantages": randn(rows, length)}
    kl = {"logprobs": randn(rows, length), "ref_logprobs": randn(rows, length)}
    scores, values = randn(rows), randn(rows, length)
    ranks = randint(4, rows, length)
    softcap = {"softcap": 5.0, "temperature": 0.7}
    old = {"old_logprobs": randn(rows, length) - 5, "advantages": randn(rows, length)}
    ref = {"ref_logprobs": kl["ref_logprobs"] - 1}
    return {
        "selective_log_softmax": Call(
            k.selective_log_softmax, logits | index | {"mask": mask}, ("logits",), {"temperature": 0.7}
        ),
        "selective_log_softmax_and_entropy": Call(
            k.selective_log_softmax_and_entropy, logits | index | {"mask": mask}, ("logits",)
        ),
        "linear_selective_log_softmax": Call(
            k.linear_selective_log_softmax, linear | index | {"mask": mask}, ("hidden", "weight")
        ),
        "linear_selective_log_softmax_and_entropy": Call(
            k.linear_selective_log_softmax_and_entropy, linear | index | bias | {"mask": mask},
            ("hidden", "weight", "bias"), softcap,
        ),
        "linear_ppo_policy_loss": Call(
            k.linear_ppo_policy_loss, linear | index | bias | old | ref | {"mask": mask}, ("hidden", "weight", "bias"),
            {"reduction": "seq-mean-token-mean", "dual_clip": 2.0, "beta": 0.1, "entropy_coefficient": 0.1},
        ),
        "linear_cross_entropy": Call(
            k.linear_cross_entropy, linear | bias | {"labels": torch.where(mask, index["index"], -100)},
            ("hidden", "weight", "bias"), softcap,
        ),
        "sample_tokens": Call(
            k.sample_tokens, logits | {"stream": randint(100, rows, length), "step": randint(100, rows, length)}, (),
            {"seed": 3, "temperature": 0.7},
        ),
        "kl_penalty": Call(k.kl_penalty, kl | {"mask": mask}, ("logprobs", "ref_logprobs"), {"estimator": "k3"}),
        "kl_shaped_rewards": Call(k.kl_shaped_rewards, {"scores": scores} | kl | {"mask": mask}, (), {"beta": 0.1}),
        "masked_gae": Call(
            k.masked_gae, {"rewards": randn(rows, length), "values": values, "mask": mask, "bootstrap": scores}, (),
            {"gamma": 0.9, "whiten": True},
        ),
        "ppo_advantages": Call(
            k.ppo_advantages, {"scores": scores} | kl | {"values": values, "mask": mask}, (),
            {"beta": 0.1, "estimator": "k2", "score_clip": 1.0},
        ),
        "ppo_policy_loss": Call(
            k.ppo_policy_loss, tokens | ref | {"mask": mask}, ("logprobs",),
            {"reduction": "seq-mean-token-sum", "dual_clip": 2.0, "beta": 0.1},
        ),
        "ppo_value_loss": Call(
            k.ppo_value_loss, {"values": values, "old_values": randn(rows, length), "returns": randn(rows, length)}
            | {"mask": mask}, ("values",),
        ),
        "pairwise_ranking_loss": Call(
            k.pairwise_ranking_loss, {"scores": randn(rows, length), "ranks": ranks, "mask": mask}, ("scores",),
            {"margin": 0.1},
        ),
    }  # fmt: skip


NAMES = tuple(calls())


def lacks(backend: str, name: str) -> bool:
    """Whether a backend lacks the op of this call."""
    return backend == "cuda" and "cuda" not in OPS[name.removesuffix("_and_entropy")].on_gpu


def interpreted(backend: str) -> bool:
    """Whether Triton's interpreter runs the kernels, which takes milliseconds for a row or a block."""
    return backend == "triton" and emulated(backend)


def fewer(backend: str, rows: int) -> int:
    """How many of these rows or blocks a test takes: few of them in the interpreter."""
    return max(2, rows // 16) if interpreted(backend) else rows


def packed_calls() -> dict[str, Call]:
    """Calls with packed sequences, of the ops that take these."""
    device = torch.get_default_device()
    boundaries = torch.tensor([0, 5, 5, 14])
    scores, rewards, values, old = (torch.randn(n, device="cpu").to(device) for n in (3, 14, 14, 14))
    gae = {"values": values, "mask": torch.arange(14) % 4 > 0, "cu_seqlens": boundaries}
    return {
        "masked_gae": Call(k.masked_gae, {"rewards": rewards} | gae),
        "ppo_advantages": Call(
            k.ppo_advantages, {"scores": scores, "logprobs": rewards, "ref_logprobs": old} | gae, (), {"beta": 0.1}
        ),
        "pairwise_ranking_loss": Call(
            k.pairwise_ranking_loss, {"scores": rewards, "ranks": torch.arange(14) % 3, "offsets": boundaries},
            ("scores",),
        ),
    }  # fmt: skip


def bad_values(call: Call) -> Iterator[tuple[dict[str, Tensor], type[Exception], str]]:
    """For each argument whose values are checked: values that do not fit, with the error that says so."""
    for name, good in call.tensors.items():
        if name == "mask":
            at = tuple(size - 1 for size in good.shape)
            for value, dtype in (
                (0.7, torch.float64), (math.nan, torch.bfloat16), (-1.0, torch.float32), (2, torch.int64)
            ):  # fmt: skip
                bad = _put(good, at, value, dtype)
                yield {name: bad}, ValueError, f"{name}: is {value} at position {at}, must be 0 or 1"
        elif name in ("index", "labels"):
            size = call.tensors["logits"].shape[-1] if "logits" in call.tensors else len(call.tensors["weight"])
            counts = good != -100 if name == "labels" else call.tensors.get("mask")
            at = tuple(counts.nonzero()[-1].tolist())
            for value, dtype in ((size, torch.int64), (-1, torch.int32)):
                bad = _put(good, at, value, dtype)
                yield {name: bad}, IndexError, f"{name}: is {value} at position {at}, must be in [0, {size})"
        elif name in ("cu_seqlens", "offsets"):
            for at, value, dtype, message in (
                (0, 1, torch.int64, "goes from 1 to 14, must go from 0 to 14"),
                (-1, 3000, torch.int32, "goes from 0 to 3000, must go from 0 to 14"),
                (1, 6, torch.int64, "decreases, must not"),
            ):
                yield {name: _put(good, (at,), value, dtype)}, ValueError, f"{name}: {message}"


def _put(good: Tensor, at: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    bad = good.to(dtype, copy=True)
    bad[at] = value
    return bad
