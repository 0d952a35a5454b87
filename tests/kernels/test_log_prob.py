import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kernels import (
    kl_penalty,
    registration,
    sample_tokens,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from rlhf_kernels.reference import log_prob as reference

LOGITS = st.one_of(
    st.floats(-10, 10, width=16), st.sampled_from([1e4, -1e4, 0.0, -math.inf]), st.floats(-1e4, 1e4, width=16)
)


@st.composite
def problems(draw):
    rows, vocabulary = draw(st.integers(0, 4)), draw(st.sampled_from([1, 2, 5, 127]))
    values = draw(st.lists(LOGITS, min_size=8, max_size=8))
    values = (values * (rows * vocabulary))[: rows * vocabulary]
    logits = torch.tensor(values, dtype=torch.float64).reshape(rows, 1, vocabulary).repeat(1, 2, 1)
    logits = torch.where(torch.isinf(logits).all(-1, keepdim=True), 0.0, logits)  # a row needs a token to choose
    index = draw(st.lists(st.integers(0, vocabulary - 1), min_size=2 * rows, max_size=2 * rows))
    index = torch.tensor(index, dtype=torch.int64).reshape(rows, 2)
    dtype = draw(st.sampled_from([*oracles.DTYPES, torch.float64]))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=2 * rows, max_size=2 * rows))).reshape(rows, 2).bool()
    return (
        draw(oracles.layouts(logits.to(dtype))),
        index.to(draw(st.sampled_from([torch.int64, torch.int32]))),
        mask.to(draw(st.sampled_from(oracles.MASK_DTYPES))),
        draw(st.sampled_from([1.0, 0.7, 2.0])),
    )


@given(problems())
def test_values_and_gradients_match_float64_loops(backend, problem):
    logits, index, mask, temperature = problem
    if logits.dtype == torch.float64 and backend != "reference":
        logits = logits.float()
    logits = oracles.garbage(logits.flatten(0, 1), mask.flatten()[:, None].expand(-1, logits.shape[-1])).view(
        logits.shape
    )
    logits.requires_grad_()
    logprobs, entropy = selective_log_softmax_and_entropy(logits, index, temperature=temperature, mask=mask)
    alone = selective_log_softmax(logits, index, temperature=temperature, mask=mask)
    assert torch.equal(alone, logprobs)
    assert logprobs.dtype == entropy.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    finite = torch.where(torch.isinf(logprobs), 0.0, logprobs)
    (2 * finite.sum() + 3 * entropy.sum()).backward()

    exact = logits.dtype == torch.float64
    for at in torch.cartesian_prod(torch.arange(index.shape[0]), torch.arange(index.shape[1])).tolist():
        row, chosen = logits[tuple(at)].tolist(), int(index[tuple(at)])
        gradient = logits.grad[tuple(at)]
        if not mask[tuple(at)]:
            assert logprobs[tuple(at)] == 0
            assert entropy[tuple(at)] == 0
            assert (gradient == 0).all()
            continue
        log_p = oracles.log_softmax(row, temperature)
        h = oracles.entropy(log_p)
        close = {"rel": 1e-9 if exact else 2e-6, "abs": 1e-9 if exact else 2e-6}
        assert logprobs[tuple(at)].item() == pytest.approx(log_p[chosen], **close)
        assert entropy[tuple(at)].item() == pytest.approx(h, rel=close["rel"], abs=close["abs"] * 10)
        g = 0.0 if log_p[chosen] == -math.inf else 2.0
        expected = [
            (g * ((i == chosen) - math.exp(lp)) - 3 * math.exp(lp) * ((lp + h) if lp != -math.inf else 0)) / temperature
            for i, lp in enumerate(log_p)
        ]
        rough = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5, torch.float64: 1e-9}[logits.dtype]
        assert gradient.tolist() == pytest.approx(expected, rel=rough, abs=rough)


def test_gradcheck(backend):
    if backend != "reference":
        pytest.skip("float64 is the reference's")
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    index, mask = torch.tensor([0, 4, 2]), torch.tensor([True, False, True])

    def both(x):
        return selective_log_softmax_and_entropy(x, index, temperature=0.8, mask=mask)

    assert torch.autograd.gradcheck(both, logits)
    assert torch.autograd.gradgradcheck(both, logits)


def test_banned_tokens(backend):
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    logprobs, entropy = selective_log_softmax_and_entropy(logits, torch.tensor([1]))
    assert logprobs.item() == -math.inf
    assert math.isfinite(entropy.item())
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()


def test_entropy_of_large_logits_keeps_its_digits(backend):
    small = torch.randn(4, 50)
    index = torch.zeros(4, dtype=torch.long)
    offset = (small + 1e4).double() - 1e4  # what is left of them when float32 holds the shifted logits
    _, entropy = selective_log_softmax_and_entropy(small + 1e4, index)
    expected = [oracles.entropy(oracles.log_softmax(row, 1.0)) for row in offset.tolist()]
    assert entropy.tolist() == pytest.approx(expected, rel=1e-5)


def test_vocabulary_of_one_and_no_rows(backend):
    logprobs, entropy = selective_log_softmax_and_entropy(torch.tensor([[3.0], [-1e4]]), torch.tensor([0, 0]))
    assert logprobs.tolist() == entropy.tolist() == [0, 0]
    empty = torch.zeros(0, 7, requires_grad=True)
    logprobs = selective_log_softmax(empty, torch.zeros(0, dtype=torch.long))
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert empty.grad.shape == (0, 7)


def test_ignored_rows_are_not_read(backend):
    logits = torch.full((3, 4), math.nan)
    logits[1] = torch.arange(4.0)
    logits.requires_grad_()
    logprobs, entropy = selective_log_softmax_and_entropy(logits, torch.tensor([-7, 2, -7]), ignore_index=-7)
    (logprobs + entropy).sum().backward()
    assert logprobs[[0, 2]].tolist() == entropy[[0, 2]].tolist() == [0, 0]
    assert (logits.grad[[0, 2]] == 0).all()
    assert (logits.grad[1] != 0).any()


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_inplace_backward_writes_the_same_gradient_over_the_logits(backend, dtype):
    base = torch.randn(2, 5, 11, dtype=dtype)
    index = torch.randint(0, 11, (2, 4))
    gradients = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        logits = (leaf * 1)[:, :-1]
        logprobs, entropy = selective_log_softmax_and_entropy(logits, index, inplace_backward=inplace)
        before = logits.detach().clone()
        (logprobs * 2 + entropy).sum().backward()
        assert torch.equal(logits.detach(), before) != inplace
        gradients.append(leaf.grad)
    assert torch.equal(gradients[1][:, :-1], logits.detach())
    assert torch.equal(*gradients)


def test_inplace_backward_refuses_a_second_pass(backend):
    logits = torch.randn(3, 5, requires_grad=True) * 1
    loss = selective_log_softmax(logits, torch.zeros(3, dtype=torch.long), inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"index": torch.tensor([0, 5])}, IndexError, r"index: is 5 at position \(1,\), must be in \[0, 5\)"),
        ({"index": torch.tensor([-1, 0])}, IndexError, r"index: is -1 at position \(0,\), must be in \[0, 5\)"),
        ({"index": torch.tensor([0])}, ValueError, r"index: has shape \(1,\), must be \(2,\)"),
        ({"index": torch.tensor([0.0, 1.0])}, TypeError, "index: has dtype torch.float32, must be one of torch.int64"),
        ({"index": [0, 1]}, TypeError, "index: is list, must be a tensor"),
        ({"index": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "index: is on meta, must be on c"),
        ({"logits": torch.zeros(2, 5).int()}, TypeError, "logits: has dtype torch.int32, must be one of torch.float32"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: has shape \(2, 0\), must be .* V at least 1"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits: has shape \(\), must be"),
        ({"temperature": 0.0}, ValueError, r"temperature: is 0.0, must be finite and in \(0.0, inf\)"),
        ({"temperature": 1e-38}, ValueError, r"temperature: is 1e-38, must be finite and in \[1e-37, 1e\+37\]"),
        ({"temperature": 1e300}, ValueError, r"temperature: is 1e\+300, must be finite and in \[1e-37, 1e\+37\]"),
        ({"temperature": math.nan}, ValueError, "temperature: is nan, must be finite"),
        ({"temperature": "1"}, TypeError, "temperature: is str, must be a number"),
        ({"mask": torch.ones(3)}, ValueError, r"mask: has shape \(3,\), must be \(2,\)"),
        ({"mask": torch.tensor([1.0, 0.5])}, ValueError, r"mask: is 0.5 at position \(1,\), must be 0 or 1"),
        ({"ignore_index": None}, TypeError, "ignore_index: is None of type NoneType, must be an int"),
        (
            {"index": torch.zeros(2, dtype=torch.int32), "ignore_index": 2**32},
            ValueError,
            r"ignore_index: is 4294967296, must be in \[-2147483648, 2147483647\], as torch.int32 is",
        ),
        ({"inplace_backward": 1}, TypeError, "inplace_backward: is 1 of type int, must be True or False"),
        (
            {"logits": lambda: torch.zeros(1, 5).expand(2, 5), "inplace_backward": True},
            ValueError,
            r"logits: has strides \(0, 1",
        ),
        (
            {"logits": lambda: torch.zeros(6).unfold(0, 5, 1), "inplace_backward": True},
            ValueError,
            r"logits: has strides \(1, 1\), so that entries share memory",
        ),
        (
            {"logits": lambda: torch.zeros(2, 5, requires_grad=True), "inplace_backward": True},
            ValueError,
            "logits: is a leaf",
        ),
        (
            {"logits": lambda: torch.zeros(5, 2, requires_grad=True).t(), "inplace_backward": True},
            ValueError,
            "logits: is a leaf",
        ),
    ],
)
def test_errors_name_the_argument(backend, arguments, error, message):
    call = {"logits": torch.zeros(2, 5), "index": torch.tensor([0, 1])} | oracles.here(arguments, message)
    with pytest.raises(error, match=message):
        selective_log_softmax(call.pop("logits"), call.pop("index"), **call)


@pytest.mark.parametrize("part", [slice(0, 1024), slice(16_384, 32_768), slice(39_000, None)])
def test_where_a_whole_part_is_nan_the_row_is(backend, part):
    """As if one logit were: no part of a row that is added up by itself may hide it, though NaN is no maximum."""
    logits = torch.randn(2, 40_000)
    logits[1, part] = math.nan
    logprobs, entropies = selective_log_softmax_and_entropy(logits, torch.tensor([20_000, 35_000]))
    assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [False, True]
    if not logits.is_cuda:
        with pytest.raises(ValueError, match=r"row \(1,\) holds NaN"):
            sample_tokens(logits, seed=0, stream=0, step=0)


def test_a_mask_of_inference_mode(backend):
    """A backward keeps the mask, and torch lets it keep none of these."""
    with torch.inference_mode():
        mask = torch.tensor([True, False])
    logits = torch.randn(2, 5, requires_grad=True)
    selective_log_softmax(logits, torch.tensor([1, 2]), mask=mask).sum().backward()
    assert (logits.grad != 0).any(1).tolist() == [True, False]
    logprobs = torch.ones(2, requires_grad=True)
    kl_penalty(logprobs, torch.zeros(2), mask).sum().backward()
    assert logprobs.grad.tolist() == [1, 0]


def test_a_bad_index_is_nan_where_values_are_not_looked_at(backend):
    """Nothing is read out of bounds, and other rows stay as they are, in the GPU kernels and in the reference."""
    if backend == "cpu":
        pytest.skip("looks at values")
    logits, index = torch.randn(4, 5), torch.tensor([3, 5, -1, -100])
    if backend == "reference":
        function = reference.selective_log_softmax_and_entropy
        got, _ = function(logits, index, index != -100, 1.0, False, with_entropy=False)
    else:
        got, *_ = registration.run_kernel(
            backend, "selective_log_softmax", logits, index, None, -100, 1.0, False, False
        )
    want = selective_log_softmax(logits, torch.tensor([3, -100, -100, -100]))
    torch.testing.assert_close(got, want.index_fill(0, torch.tensor([1, 2]), torch.nan), equal_nan=True)


def test_a_bad_index_in_a_masked_row_is_fine(backend):
    logprobs = selective_log_softmax(torch.zeros(2, 4), torch.tensor([99, 1]), mask=torch.tensor([0, 1]))
    assert logprobs.tolist() == pytest.approx([0, -math.log(4)])
