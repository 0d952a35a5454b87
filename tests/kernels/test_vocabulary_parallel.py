"""A vocabulary in parts, one in each process, gives what the whole one gives in one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlhf_kernels import (
    backends,
    linear_selective_log_softmax,
    linear_selective_log_softmax_and_entropy,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)

N, D, V = 23, 16, 240
OPTIONS = ({}, {"temperature": 0.7, "softcap": 4.0})


def together(case: str, processes: int) -> None:
    """Runs a case of this file in so many processes."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, case], stderr=subprocess.PIPE, text=True,
            env=common | {"RANK": str(i), "WORLD_SIZE": str(processes)},
        )
        for i in range(processes)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [0] * processes, "\n".join(errors)
    finally:
        for process in started:
            process.kill()


def rows(*, banned: bool = False):
    """Logits, tokens and a mask, the same in every process. Some rows' largest logits are far above the others'."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(N, V)
    logits[:3, 7] += 200
    if banned:
        logits[3:6, : V // 2] = -torch.inf
        logits[6:9, V // 2 :] = -torch.inf
    index = torch.randint(0, V, (N,))
    index[3:6], index[6:9] = V - 1, 1
    index[5], index[8] = 0, V - 2  # banned where all of their part is
    index[0] = 7
    return logits, index, torch.arange(N) % 5 != 4


def part(tensor, dim=-1):
    """This process's share of the vocabulary."""
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def near(got, want):
    """To 1e-6 of the largest entry."""
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def slopes(results, variables):
    """The gradients for a cotangent that does not depend on the results."""
    cotangents = torch.linspace(-1, 2, N)
    return torch.autograd.grad(sum((i + 1) * (x * cotangents).sum() for i, x in enumerate(results)), variables)


def from_logits():
    whole, index, mask = rows(banned=True)
    for dtype in (torch.float32, torch.bfloat16):
        for inplace in (False, True):
            whole, own = whole.to(dtype).requires_grad_(), part(whole.detach()).to(dtype).requires_grad_()
            want = selective_log_softmax_and_entropy(whole, index, temperature=0.7, mask=mask)
            got = selective_log_softmax_and_entropy(
                own * 1, index, temperature=0.7, mask=mask, inplace_backward=inplace, group=dist.group.WORLD
            )
            close(got, want)
            tolerance = 1e-6 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(
                slopes(got, own)[0],
                part(slopes(want, whole)[0]),
                rtol=tolerance,
                atol=1e-6 if tolerance == 1e-6 else 1e-4,
            )
            alone = selective_log_softmax(own, index, mask=mask.float(), group=dist.group.WORLD)
            close(alone, selective_log_softmax(whole, index, mask=mask))
            nothing = selective_log_softmax(own, index, mask=torch.zeros(N), group=dist.group.WORLD)
            assert (nothing == 0).all()
            (second,) = torch.autograd.grad(alone.sum(), own, create_graph=True)
            with pytest.raises(RuntimeError, match="selective_log_softmax has no second derivative"):
                second.sum().backward()


def from_hidden_states():
    _, index, mask = rows()
    torch.manual_seed(1)
    hidden, weight, bias = 2 * torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    for options in OPTIONS:
        variables = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        own = [hidden.clone().requires_grad_(), *(part(x, 0).requires_grad_() for x in (weight, bias))]
        want = linear_selective_log_softmax_and_entropy(
            variables[0], variables[1], index, bias=variables[2], mask=mask, **options
        )
        got = linear_selective_log_softmax_and_entropy(
            own[0], own[1], index, bias=own[2], mask=mask, group=dist.group.WORLD, **options
        )
        close(got, want)
        of_hidden, of_weight, of_bias = slopes(want, variables)
        for ours, theirs in zip(slopes(got, own), (of_hidden, part(of_weight, 0), part(of_bias, 0)), strict=True):
            near(ours, theirs)
        close(
            linear_selective_log_softmax(own[0], own[1], index, bias=own[2], group=dist.group.WORLD, **options),
            linear_selective_log_softmax(*variables[:2], index, bias=variables[2], **options),
        )


def from_a_dtensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    _, index, mask = rows()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    hidden, weight, bias = torch.randn(N, D), torch.randn(V - 3, D), torch.randn(V - 3)  # of no equal parts
    index = index.clamp(max=V - 4)
    variable = weight.clone().requires_grad_()
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    want = linear_selective_log_softmax(hidden, variable, index, bias=bias, mask=mask)
    got = linear_selective_log_softmax(hidden, sharded, index, bias=bias, mask=mask, group=mesh.get_group())
    close(got, want)
    (expected,), (gradient,) = slopes([want], variable), slopes([got], sharded)
    near(gradient.full_tensor(), expected)
    few = distribute_tensor(torch.randn(2 * dist.get_world_size() - 3, D), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"weight: has . rows, too few for a part of them in each of . processes"):
        linear_selective_log_softmax(hidden, few, index, group=mesh.get_group())
    with pytest.raises(ValueError, match=r"bias: has shape \(300,\), must be \(237,\), one entry per row of weight"):
        linear_selective_log_softmax(hidden, sharded, index, bias=torch.randn(300), group=mesh.get_group())
    with pytest.raises(TypeError, match="weight: is a DTensor, of which this process holds a part"):
        linear_selective_log_softmax(hidden, sharded, index)
    replicated = distribute_tensor(weight, mesh, [Replicate()])
    with pytest.raises(
        TypeError, match=r"weight: is a DTensor with placements .* must be split over the vocabulary alone"
    ):
        linear_selective_log_softmax(hidden, replicated, index, group=mesh.get_group())


def errors():
    whole, index, _ = rows()
    group, rank = dist.group.WORLD, dist.get_rank()
    with pytest.raises(ValueError, match=r"group: process . holds .* tokens of the vocabulary and process"):
        selective_log_softmax(whole[:, : 5 + rank], index.clamp(max=3), group=group)
    with pytest.raises(ValueError, match=r"index: processes . and . of the group differ in index or mask"):
        selective_log_softmax(part(whole), index if rank else index.flip(0), group=group)
    index[3] = V
    with pytest.raises(IndexError, match=rf"index: is {V} at position \(3,\), must be in \[0, {V}\)"):
        selective_log_softmax(part(whole), index, group=group)
    with pytest.raises(RuntimeError, match="group: needs a backend with kernels; float64 has no kernels"):
        selective_log_softmax(part(whole).double(), index, group=group)


CASES = {case.__name__: case for case in (from_logits, from_hidden_states, from_a_dtensor, errors)}


@pytest.mark.skipif(not backends.has("cpu"), reason="no native kernels in this install")
@pytest.mark.long_for(processes=[4])
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_vocabulary(case, processes):
    together(case, processes)


@pytest.fixture
def alone(tmp_path):
    """A group of one process: this one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="a group of the CPU's")
def test_every_backend_takes_the_statistics_of_all_parts(backend, alone):
    if backend in ("reference",):
        pytest.skip("it has no parts")
    logits, index, mask = rows(banned=True)
    logits.requires_grad_()
    want = selective_log_softmax_and_entropy(logits, index, mask=mask)
    got = selective_log_softmax_and_entropy(logits, index, mask=mask, group=alone)
    close(got, want)
    torch.testing.assert_close(slopes(got, logits), slopes(want, logits), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not backends.has("cpu"), reason="no native kernels in this install")
def test_compiled_code_leaves_the_graph_for_it(alone):
    logits, index, _ = rows()
    compiled = torch.compile(lambda x, i: 2 * selective_log_softmax(x, i, group=alone))
    close(compiled(logits, index), 2 * selective_log_softmax(logits, index))


@pytest.mark.runs("linear_selective_log_softmax")
def test_a_token_elsewhere_leaves_no_gradient_of_its_own(backend):
    """The backward kernels' −1: what is left is −p·(go + gh·(log p + H))/τ."""
    if backend == "reference":
        pytest.skip("it has no kernels")
    from rlhf_kernels.registration import run_kernel

    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 40)
    index = torch.tensor([-1, 3, -1, 39, -1])
    go, gh = torch.randn(2, 5)
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    for linear in (False, True):
        rows_of = hidden @ weight.T if linear else logits
        statistics = run_kernel(
            "cpu", "selective_log_softmax", rows_of, index.clamp(min=0), None, None, 0.7, True, False
        )
        exact = rows_of.double()
        p = torch.softmax(exact / 0.7, -1)
        entropy = -(p * p.log()).sum(-1, keepdim=True)
        chosen = torch.nn.functional.one_hot(index + 1, 41)[:, 1:]
        want = (chosen * go[:, None] - p * (go[:, None] + gh[:, None] * (p.log() + entropy))) / 0.7
        if linear:
            arguments = (None, 0.7, None, *statistics[1:], go, gh, True, True)
            got = run_kernel(
                backend, "linear_selective_log_softmax_backward", hidden, weight, index, None, None, *arguments
            )
            torch.testing.assert_close(got[0], (want @ weight.double()).float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got[1], (want.T @ hidden.double()).float(), rtol=1e-4, atol=1e-5)
        else:
            arguments = (0.7, *statistics[1:], go, gh)
            got = run_kernel(backend, "selective_log_softmax_backward", logits, index, None, None, *arguments)
            torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    CASES[sys.argv[1]]()
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter, and then end the process with an error
