"""What can be tested only on a GPU: CUDA graphs, and the ops that compiled code calls there."""

import pytest
import torch
from calls import NAMES, Recorder, calls, lacks

import rlhf_kernels
from rlhf_kernels import backends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_graph_captures_every_op(backend, name):
    if not backends.has(backend) or lacks(backend, name):
        pytest.skip(backends.missing(backend) or "the linear family is in Triton")
    with rlhf_kernels.use_backend(backend), torch.device("cuda"):
        call = calls()[name]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call.run()
        for tensor in call.tensors.values():
            if tensor.is_floating_point():
                tensor.mul_(0.5)
        graph.replay()
        for x, y in zip(got, call.run(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    """Checks the ops with the arguments that the public function gives them."""
    with rlhf_kernels.use_backend("cpu"), Recorder() as recorder:
        calls()[name].run()
    for function, arguments in recorder.seen:
        on_gpu = tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments)
        torch.library.opcheck(function, on_gpu, test_utils=("test_schema", "test_faketensor"))
