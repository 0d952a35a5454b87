import math

import oracles
import pytest
import torch
from calls import calls
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kernels import ppo_policy_loss, ppo_value_loss, use_backend

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


def table(function, mask, *tensors):
    """A function of floats at every unmasked position; None elsewhere."""
    return [
        [function(*xs) if m else None for m, *xs in zip(*rows, strict=True)]
        for rows in zip(mask.tolist(), *(x.tolist() for x in tensors), strict=True)
    ]


def mean(cells):
    flat = [x for row in cells for x in row if x is not None]
    return sum(flat) / len(flat) if flat else 0.0


@given(
    oracles.batches(),
    st.sampled_from(REDUCTIONS),
    st.sampled_from([(0.2, None), (0.1, 0.4)]),
    st.sampled_from([None, 1.5]),
    st.sampled_from(oracles.DTYPES),
    st.integers(0, 2**31),
)
def test_policy_loss_matches_loops(backend, mask, reduction, clip, dual_clip, dtype, seed):
    torch.manual_seed(seed)
    logprobs, old, advantages = torch.randn(3, *mask.shape).to(dtype)
    low, high = 1 - clip[0], 1 + (clip[1] or clip[0])
    cells = table(lambda *x: oracles.policy_loss(*x, low, high, dual_clip), mask, logprobs, old, advantages)
    losses = [[None if c is None else c[0] for c in row] for row in cells]
    ratios = table(lambda a, b: math.exp(a - b), mask, logprobs, old)
    logprobs, old, advantages = (oracles.garbage(x, mask) for x in (logprobs, old, advantages))
    logprobs.requires_grad_()
    loss, stats = ppo_policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        clip_range=clip[0],
        clip_range_high=clip[1],
        dual_clip=dual_clip,
        reduction=reduction,
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracles.reduce(losses, mask.tolist(), reduction), rel=1e-4, abs=1e-5)
    assert stats["ratio_mean"].item() == pytest.approx(mean(ratios), rel=1e-4)
    kl = [[None if r is None else r - 1 - math.log(r) for r in row] for row in ratios]
    assert stats["approx_kl"].item() == pytest.approx(mean(kl), rel=1e-4, abs=1e-6)
    cut = [[None if c is None else float(c[1]) for c in row] for row in cells]
    assert stats["clip_fraction"].item() == pytest.approx(mean(cut), abs=1e-6)
    deviation = max((abs(r - 1) for row in ratios for r in row if r is not None), default=0.0)
    assert stats["ratio_max_deviation"].item() == pytest.approx(deviation, rel=1e-4, abs=1e-6)
    assert not any(x.requires_grad for x in stats.values())

    loss.backward()
    if reduction == "token-mean":  # the gradient of a position is −A·r where nothing cuts it off, over the count
        count = max(int(mask.sum()), 1)
        for b, row in enumerate(cells):
            for t, cell in enumerate(row):
                want = 0.0 if cell is None or cell[2] else -advantages[b, t].item() * ratios[b][t] / count
                assert logprobs.grad[b, t].item() == pytest.approx(want, rel=2e-2, abs=1e-3)
    assert torch.isfinite(logprobs.grad).all()
    assert (logprobs.grad[~mask.bool()] == 0).all()


@given(oracles.batches(), st.sampled_from(REDUCTIONS), st.sampled_from([None, 0.2, 1.0]), st.integers(0, 2**31))
def test_value_loss_matches_loops(backend, mask, reduction, clip_range, seed):
    torch.manual_seed(seed)
    values, old, returns = torch.randn(3, *mask.shape)
    cells = table(lambda *x: oracles.value_loss(*x, clip_range), mask, values, old, returns)
    losses = [[None if c is None else c[0] for c in row] for row in cells]
    means = [mean(table(lambda x: x, mask, x)) for x in (values, returns)]
    values, old, returns = (oracles.garbage(x, mask) for x in (values, old, returns))
    values.requires_grad_()
    loss, stats = ppo_value_loss(values, old, returns, mask, clip_range=clip_range, reduction=reduction)
    assert loss.item() == pytest.approx(oracles.reduce(losses, mask.tolist(), reduction), rel=1e-4, abs=1e-6)
    cut = [[None if c is None else float(c[1]) for c in row] for row in cells]
    assert stats["clip_fraction"].item() == pytest.approx(mean(cut), abs=1e-6)
    assert [stats[x].item() for x in ("value_mean", "return_mean")] == pytest.approx(means, rel=1e-4, abs=1e-6)
    assert not any(x.requires_grad for x in stats.values())
    loss.backward()
    assert torch.isfinite(values.grad).all()
    assert (values.grad[~mask.bool()] == 0).all()


def test_gradcheck(backend):
    if backend != "reference":
        pytest.skip("float64 is the reference's")
    x, old, target = torch.randn(3, 4, 5, dtype=torch.float64)
    x.requires_grad_()
    mask = torch.rand(4, 5) < 0.7
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda p, r=reduction: ppo_policy_loss(p, old, target, mask, dual_clip=1.5, reduction=r)[0], x
        )
        assert torch.autograd.gradcheck(lambda v, r=reduction: ppo_value_loss(v, old, target, mask, reduction=r)[0], x)


def test_equal_policies_have_a_ratio_of_one(backend):
    logprobs = torch.randn(3, 4)
    advantages = torch.randn(3, 4)
    loss, stats = ppo_policy_loss(logprobs, logprobs, advantages, None)
    assert loss.item() == pytest.approx(-advantages.double().mean().item(), rel=1e-5)
    assert stats["ratio_mean"] == 1
    assert stats["approx_kl"] == stats["clip_fraction"] == stats["ratio_max_deviation"] == 0


@pytest.mark.parametrize("position", [0, 3, 20])
def test_nan_shows_wherever_it_stands(backend, position):
    logprobs = torch.zeros(37)
    logprobs[position] = torch.nan
    logprobs.requires_grad_()
    loss, stats = ppo_policy_loss(logprobs, torch.zeros(37), torch.ones(37), None)
    loss.backward()
    assert loss.isnan()
    assert all(stats[name].isnan() for name in ("ratio_mean", "ratio_max_deviation", "approx_kl"))
    assert logprobs.grad.isnan().nonzero().flatten().tolist() == [position]


@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_a_ratio_that_overflows_is_clipped_without_nan(backend, advantage):
    logprobs = torch.tensor([0.0, -1.0], requires_grad=True)
    loss, _ = ppo_policy_loss(logprobs, torch.tensor([-2e4, -1.0]), torch.full((2,), advantage), None)
    loss.backward()
    assert loss.item() == pytest.approx(-advantage * (1.2 + 1) / 2)
    assert logprobs.grad.tolist() == pytest.approx([0, -advantage / 2])


def test_without_clipping_no_value_counts_as_clipped(backend):
    """Not even one that is no number, which shows in the loss."""
    values = torch.tensor([[1.0, math.nan, math.inf]])
    loss, stats = ppo_value_loss(values, torch.zeros(1, 3), torch.zeros(1, 3), None, clip_range=None)
    assert loss.isnan()
    assert stats["clip_fraction"] == 0


def test_a_banned_token_has_ratio_zero(backend):
    logprobs = torch.tensor([-math.inf, -1.0], requires_grad=True)
    loss, stats = ppo_policy_loss(logprobs, torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 1.0]), None)
    loss.backward()
    assert loss.item() == pytest.approx(-0.5)
    assert stats["ratio_mean"] == 0.5
    assert logprobs.grad.tolist() == pytest.approx([0, -0.5])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_nothing_unmasked_is_zero_with_zero_gradient(backend, reduction, shape):
    x = torch.full(shape, math.nan, requires_grad=True)
    for function in (ppo_policy_loss, ppo_value_loss):
        loss, stats = function(x, x, x, torch.zeros(shape), reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss == 0
        assert (gradient == 0).all()
        assert all(s == 0 for s in stats.values())


def test_targets_are_constants(backend):
    x, old, target = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    for function in (ppo_policy_loss, ppo_value_loss):
        gradients = torch.autograd.grad(function(x, old, target, None)[0], (x, old, target), allow_unused=True)
        assert gradients[0] is not None
        assert gradients[1] is None
        assert gradients[2] is None


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (ppo_policy_loss, {"clip_range": 1.5}, ValueError, r"clip_range: is 1.5, must be finite and in \(0.0, 1.0\]"),
        (ppo_policy_loss, {"clip_range_high": -0.1}, ValueError, "clip_range_high: is -0.1, must be"),
        (ppo_policy_loss, {"clip_range_high": 1.28}, ValueError, "clip_range_high: is 1.28, must be"),
        (ppo_policy_loss, {"dual_clip": 1.0}, ValueError, r"dual_clip: is 1.0, must be finite and in \(1.0"),
        (ppo_policy_loss, {"denominator": 0}, ValueError, r"denominator: is 0, must be finite and in \(0.0"),
        (
            ppo_policy_loss,
            {"denominator": 3, "reduction": "token-sum"},
            ValueError,
            "denominator: is 3 with reduction 'token-sum', which divides by nothing",
        ),
        (ppo_policy_loss, {"reduction": "mean"}, ValueError, "reduction: is 'mean', must be one of 'token-mean'"),
        (ppo_policy_loss, {"reduction": "seq-mean-token-sum"}, ValueError, r"reduction: is 'seq-mean-.* \(B, T\)"),
        (ppo_policy_loss, {"mask": torch.zeros(3)}, ValueError, r"mask: has shape \(3,\), must be \(4,\)"),
        (
            ppo_policy_loss,
            {"mask": torch.tensor([0, 1, 1, 3])},
            ValueError,
            r"mask: is 3 at position \(3,\), must be 0 or",
        ),
        (
            ppo_policy_loss,
            {"logprobs": torch.zeros(1, 1, 1)},
            ValueError,
            r"logprobs: has shape \(1, 1, 1\), must be \(B",
        ),
        (ppo_value_loss, {"clip_range": -1}, ValueError, "clip_range: is -1, must be"),
        (ppo_value_loss, {"clip_range": 0.0}, ValueError, "clip_range: is 0.0, must be"),
        (ppo_value_loss, {"old_values": None}, TypeError, "old_values: is NoneType, must be a tensor"),
        (ppo_value_loss, {"returns": torch.zeros(5)}, ValueError, r"returns: has shape \(5,\), must be \(4,\)"),
    ],
)
def test_errors_name_the_argument(backend, function, arguments, error, message):
    names = ("logprobs", "old_logprobs", "advantages")
    if function is ppo_value_loss:
        names = ("values", "old_values", "returns")
    call = {name: torch.zeros(4) for name in names} | {"mask": None} | oracles.here(arguments, message)
    with pytest.raises(error, match=message):
        function(**call)


@pytest.mark.parametrize("advantage", [math.inf, -math.inf, 1e38, -1e38])
def test_a_huge_advantage_spoils_no_other_position(backend, advantage):
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    old, advantages = torch.tensor([-1.1, -102.0, -2.9]), torch.tensor([advantage, 1.0, 1.0])
    loss, _ = ppo_policy_loss(logprobs, old, advantages, None)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    with use_backend("reference"):
        want, _ = ppo_policy_loss(logprobs.double(), old.double(), advantages.double(), None)
        (want_gradient,) = torch.autograd.grad(want, logprobs)
    torch.testing.assert_close(loss, want.float())
    torch.testing.assert_close(gradient, want_gradient)


@pytest.mark.runs("linear_ppo_policy_loss")
@pytest.mark.parametrize("name", ["ppo_policy_loss", "ppo_value_loss", "linear_ppo_policy_loss"])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_micro_batches_add_up_to_the_batch(backend, name, reduction):
    """Rows without a position count nowhere, and the last micro-batch is nothing but such rows."""
    call = calls(7, 9)[name]
    mask = call.tensors["mask"] = call.tensors["mask"].clone()
    mask[5:] = False
    call = call._replace(options=call.options | {"reduction": reduction})
    first = -len(call.variables)  # the first gradient, which has a row for every one of the batch
    whole = call.run()
    number = int(mask.sum() if reduction == "token-mean" else mask.any(1).sum())
    parts = call._replace(options=call.options | {"denominator": number})
    by_row = {n for n, x in call.tensors.items() if x.shape[0] == 7 and n != "weight"}
    total, slopes = 0.0, []
    for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
        results = parts.run(**{n: x[rows] for n, x in call.tensors.items() if n in by_row})
        total += results[0]
        slopes.append(results[first])
    torch.testing.assert_close(total, whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(slopes), whole[first], rtol=1e-4, atol=1e-6)


def test_a_sum_is_the_mean_times_the_number(backend):
    for name in ("ppo_policy_loss", "ppo_value_loss"):
        call = calls(7, 9)[name]
        for flat in (False, True):
            tensors = {n: x.flatten() if flat else x for n, x in call.tensors.items()}
            mean = call._replace(tensors=tensors, options={"reduction": "token-mean"}).run()
            total = call._replace(tensors=tensors, options={"reduction": "token-sum"}).run()
            number = tensors["mask"].sum()
            torch.testing.assert_close(total[0], mean[0] * number, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(total[-1], mean[-1] * number, rtol=1e-5, atol=1e-6)
            assert all(torch.equal(a, b) for a, b in zip(total[1:-1], mean[1:-1], strict=True))  # statistics
