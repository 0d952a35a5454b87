"""Results have the same bits in every run, on any number of threads, and for a row whichever rows are beside it."""

import oracles
import pytest
import torch
from calls import NAMES, calls, fewer, interpreted

import rlhf_kernels as k

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(x):
    """As bytes, in which NaN and the sign of 0 can be told apart."""
    return x.contiguous().view(torch.uint8) if x.dim() else x


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.long_for(kernels=["triton"], dtype=[torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_thread_counts(kernels, threads, name, dtype):
    on_cpu = kernels == "cpu"
    call = calls(*(23, 67) if on_cpu else (fewer(kernels, 5), 19), dtype)[name]
    threads(1)
    want = call.run()
    for count in (1, 2, 3, 2) if on_cpu else (1,):
        threads(count)
        same(call.run(), want)


@pytest.mark.long_for(kernels=["triton"], depth=[600])
@pytest.mark.runs("linear_selective_log_softmax")
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize(("depth", "vocabulary"), [(37, 301), (600, 1111)])
def test_a_row_of_linear_log_probs_is_the_same_alone_in_8_and_in_512(kernels, threads, dtype, depth, vocabulary):
    rows = 80 if interpreted(kernels) else 512
    hidden, weight = torch.randn(rows, depth).to(dtype), (torch.randn(vocabulary, depth) / depth**0.5).to(dtype)
    index = torch.randint(0, vocabulary, (rows,))
    whole = k.linear_selective_log_softmax_and_entropy(hidden, weight, index)
    for start, size in ((0, 1), (3, 1), (rows - 1, 1), (0, 8), (66, 8), (rows // 5, rows // 2)):
        some = slice(start, start + size)
        threads(1 + size % 3)
        part = k.linear_selective_log_softmax_and_entropy(hidden[some], weight, index[some])
        same(part, [x[some] for x in whole])
    # Masked neighbours are dropped before the matmul, and change nothing either.
    mask = torch.rand(rows) < 0.3
    masked = k.linear_selective_log_softmax_and_entropy(hidden, weight, index, mask=mask)
    same([x[mask] for x in masked], [x[mask] for x in whole])


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_a_row_of_log_probs_and_its_gradient_are_the_same_alone(threads, dtype):
    logits, index = torch.randn(40, 5003).to(dtype).requires_grad_(), torch.randint(0, 5003, (40,))
    whole = k.selective_log_softmax_and_entropy(logits, index)
    (gradient,) = torch.autograd.grad(whole[0].sum() + whole[1].sum(), logits)
    for row in (0, 17, 39):
        threads(1 + row % 3)
        alone = logits[row : row + 1].detach().requires_grad_()
        part = k.selective_log_softmax_and_entropy(alone, index[row : row + 1])
        same([x.detach() for x in part], [x[row : row + 1].detach() for x in whole])
        same(torch.autograd.grad(part[0].sum() + part[1].sum(), alone), [gradient[row : row + 1]])


def test_the_rows_of_small_ops_are_the_same_alone(kernels):
    for name in ("kl_penalty", "kl_shaped_rewards", "masked_gae", "ppo_advantages"):
        call = calls(9, fewer(kernels, 1500))[name]
        call = call._replace(options=call.options | ({"whiten": False} if "gae" in name or "adv" in name else {}))
        whole = call.run()
        part = call.run(**{n: x[4:5] for n, x in call.tensors.items()})
        same(part, [x[4:5] for x in whole])
