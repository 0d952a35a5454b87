import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kernels import (
    backends,
    linear_cross_entropy,
    linear_ppo_policy_loss,
    linear_selective_log_softmax,
    linear_selective_log_softmax_and_entropy,
    ppo_policy_loss,
    selective_log_softmax,
    use_backend,
)


def loops(hidden, weight, bias, softcap, temperature):
    """Log-softmax rows from lists."""
    rows = []
    for h in hidden:
        logits = [math.fsum(x * y for x, y in zip(h, w, strict=True)) + b for w, b in zip(weight, bias, strict=True)]
        if softcap is not None:
            logits = [softcap * math.tanh(logit / softcap) for logit in logits]
        rows.append(oracles.log_softmax(logits, temperature))
    return rows


@given(
    st.integers(0, 4),
    st.sampled_from([1, 2, 9]),
    st.sampled_from([6, 0]),
    st.sampled_from(oracles.DTYPES),
    st.sampled_from([None, 3.0]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_values_match_float64_loops(backend, rows, vocabulary, width, dtype, softcap, with_bias, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 2, width).to(dtype)
    weight = torch.randn(vocabulary, width).to(dtype)
    bias = torch.randn(vocabulary).to(dtype)
    index = torch.randint(0, vocabulary, (rows, 2), dtype=torch.int32)
    mask = torch.rand(rows, 2) < 0.7
    hidden = oracles.garbage(hidden, mask[..., None].expand_as(hidden)).requires_grad_()
    weight.requires_grad_()
    logprobs, entropy = linear_selective_log_softmax_and_entropy(
        hidden, weight, index, bias=bias if with_bias else None, temperature=0.7, softcap=softcap, mask=mask
    )
    alone = linear_selective_log_softmax(
        hidden, weight, index, bias=bias if with_bias else None, temperature=0.7, softcap=softcap, mask=mask
    )
    assert torch.equal(alone, logprobs)
    assert logprobs.dtype == torch.float32
    expected = loops(
        torch.where(mask[..., None], hidden, 0.0).flatten(0, 1).tolist(),
        weight.tolist(),
        bias.tolist() if with_bias else [0.0] * vocabulary,
        softcap,
        0.7,
    )
    for i, keep in enumerate(mask.flatten().tolist()):
        want = (expected[i][index.flatten()[i]], oracles.entropy(expected[i])) if keep else (0, 0)
        assert (logprobs.flatten()[i].item(), entropy.flatten()[i].item()) == pytest.approx(want, rel=1e-5, abs=1e-5)
    (logprobs + entropy).sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert (hidden.grad[~mask] == 0).all()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_gradcheck(backend):
    if backend != "reference":
        pytest.skip("float64 is the reference's")
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (5,)))
    index = torch.tensor([0, -100, 4, 2])

    def both(h, w, b):
        return linear_selective_log_softmax_and_entropy(h, w, index, bias=b, temperature=0.8, softcap=2.0)

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, index, bias=b, softcap=2.0), (hidden, weight, bias)
    )
    old, advantages, mask = torch.full((4,), -1.5).double(), torch.randn(4).double(), torch.tensor([1, 0, 1, 1])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_ppo_policy_loss(h, w, index, old, advantages, mask, bias=b, clip_range=0.9)[0],
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_policy_loss_is_the_loss_of_the_log_probs(backend, reduction):
    hidden, weight = torch.randn(3, 4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    index = torch.where(mask.bool(), torch.randint(0, 9, (3, 4)), -100)  # no token at masked positions
    advantages = oracles.garbage(torch.randn(3, 4), mask)
    options = {"clip_range": 0.1, "clip_range_high": 0.3, "dual_clip": 2.0, "reduction": reduction}
    logprobs, entropy = linear_selective_log_softmax_and_entropy(hidden, weight, index, mask=mask)
    old = oracles.garbage(logprobs.detach() + 0.3 * torch.randn(3, 4), mask)
    expected, expected_stats = ppo_policy_loss(logprobs, old, advantages, mask, **options)
    loss, stats = linear_ppo_policy_loss(hidden, weight, index, old, advantages, mask, **options)
    torch.testing.assert_close(loss, expected)
    assert stats.keys() == expected_stats.keys() | {"entropy"}
    expected_stats["entropy"] = entropy.sum() / mask.sum()
    for name, value in stats.items():
        torch.testing.assert_close(value, expected_stats[name].detach())
        assert not value.requires_grad
    got, want = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(backend, reduction):
    hidden, weight = torch.randn(2, 5, 6), torch.randn(9, 6)
    labels = torch.randint(0, 9, (2, 5))
    labels[0, :3] = -100
    rows = loops(hidden.flatten(0, 1).tolist(), weight.tolist(), [0.0] * 9, None, 1.0)
    terms = [-rows[i][label] for i, label in enumerate(labels.flatten().tolist()) if label != -100]
    expected = sum(terms) / (len(terms) if reduction == "mean" else 1)
    assert linear_cross_entropy(hidden, weight, labels, reduction=reduction).item() == pytest.approx(expected, rel=1e-5)


def gradients_of_float64(hidden, weight, index, slopes):
    """Of Σ slope · log p, a few rows at a time: what a loss with these slopes has as gradients."""
    hidden, weight = hidden.double(), weight.double()
    of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows in torch.arange(len(hidden)).split(256):
        d = -torch.softmax(hidden[rows] @ weight.T, -1)
        d[torch.arange(len(rows)), index[rows]] += 1
        d *= slopes[rows, None]
        of_hidden[rows] = d @ weight
        of_weight += d.T @ hidden[rows]
    return of_hidden, of_weight


def check_scaled_gradients(loss, rows, vocabulary):
    """The gradients of float16 operands under a loss scale of 65 536 are the exact ones, to the rounding of that type.

    The gradient of a logit, p / rows, is mostly below the smallest float16 until that factor comes.
    """
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 8).half().requires_grad_(), torch.randn(vocabulary, 8).half().requires_grad_()
    index, advantages = torch.randint(0, vocabulary, (rows,)), torch.randn(rows)
    with torch.no_grad():
        logprobs = linear_selective_log_softmax(hidden, weight, index)
    if loss == "policy":
        old = logprobs + 0.1 * torch.randn(rows)
        value, _ = linear_ppo_policy_loss(
            hidden[None], weight, index[None], old[None], advantages[None], None, clip_range=1.0
        )
        slopes = -advantages.double() * (logprobs.double() - old.double()).exp() / rows
    else:
        value = linear_cross_entropy(hidden, weight, index)
        slopes = torch.full((rows,), -1 / rows, dtype=torch.float64)
    (65_536 * value).backward()
    exact = gradients_of_float64(hidden.detach(), weight.detach(), index, 65_536 * slopes)
    for operand, want in zip((hidden, weight), exact, strict=True):
        assert operand.grad.dtype == torch.float16
        error = (operand.grad.double() - want).abs()
        assert error.norm() <= 1e-3 * want.norm()
        relative = error / want.abs()
        assert relative.median() <= 2.0**-11  # half a unit in the last place of a float16
        assert (relative > 1e-2).float().mean() <= 0.03  # where terms cancel


@pytest.mark.parametrize("loss", ["policy", "cross-entropy"])
def test_float16_under_a_loss_scale(backend, loss):
    check_scaled_gradients(loss, 256, 2000)


@pytest.mark.long
@pytest.mark.skipif(not backends.has("cpu"), reason="no native kernels in this install")
def test_float16_under_a_loss_scale_at_full_size():
    check_scaled_gradients("policy", 8192, 128_256)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 0)])
def test_nothing_to_learn_from_is_zero_with_zero_gradient(backend, shape):
    hidden, weight = torch.randn(*shape, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    labels = torch.full(shape, -100)
    zeros = torch.zeros(shape)
    for loss in (
        linear_cross_entropy(hidden, weight, labels),
        linear_ppo_policy_loss(hidden, weight, labels, zeros, zeros, zeros)[0],
    ):
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert loss == 0
        assert all((g == 0).all() for g in gradients)


def test_one_hidden_state_without_a_leading_shape(backend):
    hidden, weight = torch.randn(6), torch.randn(9, 6)
    logprob = linear_selective_log_softmax(hidden, weight, torch.tensor(3))
    expected = loops([hidden.tolist()], weight.tolist(), [0.0] * 9, None, 1.0)[0][3]
    assert logprob.shape == ()
    assert logprob.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("banned", [slice(0, 1500), slice(1500, 3000), slice(5, 3000)])
def test_a_whole_part_of_the_vocabulary_may_be_banned(backend, banned):
    """Parts are added up by themselves, and these have nothing to add, not even NaN."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    bias = torch.zeros(3000)
    bias[banned] = -torch.inf
    index = (bias == 0).nonzero().flatten()[[0, 1, -1]]
    results = linear_selective_log_softmax_and_entropy(hidden, weight, index, bias=bias)
    loss = linear_cross_entropy(hidden, weight, index, bias=bias)
    allowed = torch.where(bias[:, None] == 0, weight, 0).double() @ hidden.T.double() + bias[:, None]
    logprobs = allowed.T.log_softmax(-1)
    want = logprobs.gather(1, index[:, None]).squeeze(1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(1)
    torch.testing.assert_close(results, (want.float(), entropy.float()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, -want.mean().float(), rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad(results[0].sum() + results[1].sum() + loss, (hidden, weight)):
        assert gradient.isfinite().all()


def test_a_bias_of_minus_infinity_bans_a_token(backend):
    hidden, weight, bias = torch.randn(2, 6, requires_grad=True), torch.randn(4, 6), torch.zeros(4)
    bias[1] = -math.inf
    logprobs, entropy = linear_selective_log_softmax_and_entropy(hidden, weight, torch.tensor([0, 1]), bias=bias)
    assert logprobs[1] == -math.inf
    assert torch.isfinite(entropy).all()
    (logprobs[0] + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()


def test_operands_have_autocast_s_dtype_and_nothing_else_has(backend):
    hidden, weight, index = torch.randn(5, 6), torch.randn(9, 6, requires_grad=True), torch.arange(5)
    expected = linear_selective_log_softmax(hidden.bfloat16(), weight.bfloat16(), index)
    (slope,) = torch.autograd.grad(expected.sum(), weight)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        got = linear_selective_log_softmax(hidden, weight, index)
        assert torch.equal(got, expected)
        assert got.dtype == torch.float32
    (gradient,) = torch.autograd.grad(got.sum(), weight)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, slope)


def test_autocast_leaves_float64_alone():
    hidden, weight, index = torch.randn(5, 6).double(), torch.randn(9, 6).double(), torch.arange(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = linear_selective_log_softmax(hidden, weight, index)
    assert torch.equal(under, linear_selective_log_softmax(hidden, weight, index))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden: has shape \(\), must be \(\.\.\., D\)"),
        ({"weight": torch.zeros(4, 7)}, ValueError, r"weight: has shape \(4, 7\), must be \(4, 6\)"),
        ({"weight": torch.zeros(0, 6)}, ValueError, r"weight: has shape \(0, 6\), must be \(V, D\) with V at least 1"),
        (
            {"weight": torch.zeros(4, 6).long()},
            TypeError,
            "weight: has dtype torch.int64, must be one of torch.float32",
        ),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: has shape \(5,\), must be \(4,\)"),
        ({"softcap": 0.0}, ValueError, r"softcap: is 0.0, must be finite and in \(0.0"),
        ({"temperature": -1.0}, ValueError, "temperature: is -1.0, must be"),
        ({"labels": torch.tensor([0, 4])}, IndexError, r"labels: is 4 at position \(1,\), must be in \[0, 4\)"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, r"labels: has shape \(3,\), must be \(2,\)"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index: is 1.0 of type float, must be an int"),
        ({"reduction": "none"}, ValueError, "reduction: is 'none', must be one of 'mean', 'sum'"),
    ],
)
def test_errors_name_the_argument(backend, arguments, error, message):
    call = {"hidden": torch.zeros(2, 6), "weight": torch.zeros(4, 6), "labels": torch.tensor([0, 1])} | oracles.here(
        arguments, message
    )
    with pytest.raises(error, match=message):
        linear_cross_entropy(**call)


def test_policy_loss_takes_no_ignore_index(backend):
    hidden, weight, zeros = torch.zeros(2, 6), torch.zeros(4, 6), torch.zeros(2)
    for index in (-100, 4):
        arguments = (hidden, weight, torch.tensor([index, 0]), zeros, zeros, None)
        if hidden.is_cuda:  # its values are not looked at
            assert linear_ppo_policy_loss(*arguments)[0].isnan()
            continue
        with pytest.raises(IndexError, match=rf"index: is {index} at position \(0,\), must be in \[0, 4\)"):
            linear_ppo_policy_loss(*arguments)
    with pytest.raises(ValueError, match=r"reduction: is 'seq-mean-token-sum', which needs \(B, T\) inputs"):
        linear_ppo_policy_loss(hidden, weight, torch.tensor([1, 0]), zeros, zeros, None, reduction="seq-mean-token-sum")


@pytest.mark.parametrize("odd", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_operands_of_two_dtypes_meet_in_the_wider(odd, dtype):
    operands = {"hidden": torch.randn(5, 6), "weight": torch.randn(9, 6), "bias": torch.randn(9)}
    operands[odd] = operands[odd].to(dtype)
    index = torch.randint(0, 9, (5,))
    wide = torch.promote_types(torch.float32, dtype)
    got = linear_selective_log_softmax(index=index, **operands)
    assert got.dtype == wide
    assert torch.equal(got, linear_selective_log_softmax(index=index, **{n: x.to(wide) for n, x in operands.items()}))


@pytest.mark.skipif(not backends.has("cpu"), reason="no native kernels in this install")
def test_numbers_below_the_smallest_normal_one_are_zero():
    """Processors take a hundred times as long over them, and a peaked distribution is full of them."""
    hidden = torch.tensor([[0.0, -95.0, -1.0]]).repeat(400, 1).requires_grad_()  # e^−95 is 6e-42
    with use_backend("cpu"):
        linear_cross_entropy(hidden, torch.eye(3), torch.zeros(400, dtype=torch.long), reduction="sum").backward()
    assert (hidden.grad[:, 1] == 0).all()
    assert (hidden.grad[:, 2] > 0.2).all()
    logits = hidden.detach().requires_grad_()
    with use_backend("cpu"):
        selective_log_softmax(logits, torch.zeros(400, dtype=torch.long)).sum().backward()
    assert (logits.grad[:, 1] == 0).all()


@pytest.mark.skipif(not backends.has("cpu"), reason="no native kernels in this install")
@pytest.mark.parametrize("flush", [False, True])
def test_the_caller_s_own_way_with_small_numbers_stays(flush):
    small = torch.full((1 << 20,), 1e-40)  # so many that every thread has some
    assert torch.set_flush_denormal(flush)
    try:
        hidden, weight = torch.randn(600, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
        with use_backend("cpu"):
            linear_cross_entropy(hidden, weight, torch.zeros(600, dtype=torch.long)).backward()
        own_thread = small[:1024] * 1.0
        assert torch.count_nonzero(own_thread) == (0 if flush else 1024)
        if not flush:  # torch's own switch is for the thread that calls it
            assert torch.count_nonzero(small * 1.0) == len(small)
    finally:
        torch.set_flush_denormal(False)
