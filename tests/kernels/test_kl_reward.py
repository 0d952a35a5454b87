import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kernels import kl_penalty, kl_shaped_rewards, use_backend

ESTIMATORS = ("k1", "k2", "k3", "abs")


@given(
    st.lists(st.tuples(st.floats(-30, 0, width=16), st.floats(-30, 0, width=16)), max_size=6),
    st.sampled_from(ESTIMATORS),
    st.sampled_from(oracles.DTYPES),
)
def test_penalty_matches_float64(backend, pairs, estimator, dtype):
    table = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 2).to(dtype)
    penalty = kl_penalty(table[:, 0], table[:, 1], estimator=estimator)
    assert penalty.dtype == torch.float32
    expected = [oracles.kl(a, b, estimator) for a, b in table.tolist()]
    assert penalty.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(oracles.batches(), st.sampled_from(ESTIMATORS), st.booleans(), st.integers(0, 2**31))
def test_a_masked_penalty_is_0_with_no_gradient(backend, mask, estimator, deep, seed):
    torch.manual_seed(seed)
    logprobs, ref = torch.randn(2, *mask.shape)
    want = kl_penalty(logprobs, ref, estimator=estimator)
    variables = [oracles.garbage(x, mask).requires_grad_() for x in (logprobs, ref)]
    shaped = [x[None] if deep else x for x in (*variables, mask)]
    penalty = kl_penalty(*shaped, estimator=estimator).view(mask.shape)
    kept = mask.bool()
    assert torch.equal(penalty[kept], want[kept])
    assert (penalty[~kept] == 0).all()
    for gradient in torch.autograd.grad(penalty.sum(), variables):
        assert (gradient[~kept] == 0).all()
        assert torch.isfinite(gradient).all()


def test_padding_of_two_trainers_makes_no_infinity(backend):
    logprobs = torch.tensor([[-1.0, 0.0], [-2.0, -100.0]], requires_grad=True)
    ref, mask = torch.tensor([[-1.5, -100.0], [-2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    penalty = kl_penalty(logprobs, ref, mask, estimator="k3")
    (gradient,) = torch.autograd.grad((penalty * mask).sum(), logprobs)
    assert penalty.flatten().tolist() == pytest.approx([math.exp(-0.5) - 0.5, 0, 0, 0], rel=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([1 - math.exp(-0.5), 0, 0, 0], rel=1e-6)
    with pytest.raises(ValueError, match=r"mask: has shape \(2,\), must be \(2, 2\)"):
        kl_penalty(logprobs, ref, mask[0])


def test_estimators_average_to_the_kl(backend):
    """Σ p·k1 and Σ p·k3 are KL(p ‖ q) exactly, for distributions small enough to sum over."""
    p, q = torch.softmax(torch.randn(2, 50, dtype=torch.float64), -1).float()
    expected = math.fsum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    for estimator in ("k1", "k3"):
        mean = (p * kl_penalty(p.log(), q.log(), estimator=estimator)).sum().item()
        assert mean == pytest.approx(expected, rel=1e-4)


@given(oracles.batches(), st.sampled_from(ESTIMATORS), st.sampled_from([None, 0.5]), st.integers(0, 2**31))
def test_rewards_match_loops(backend, mask, estimator, score_clip, seed):
    torch.manual_seed(seed)
    logprobs, ref = torch.randn(2, *mask.shape)
    scores = torch.randn(mask.shape[0])
    scores = oracles.garbage(scores, mask.bool().any(-1))
    logprobs, ref = (oracles.garbage(x, mask) for x in (logprobs, ref))
    rewards, kl = kl_shaped_rewards(scores, logprobs, ref, mask, beta=0.1, estimator=estimator, score_clip=score_clip)
    for b, row in enumerate(mask.tolist()):
        steps = [t for t, m in enumerate(row) if m]
        for t, m in enumerate(row):
            if not m:
                assert rewards[b, t] == 0
                assert kl[b, t] == 0
                continue
            penalty = oracles.kl(logprobs[b, t].item(), ref[b, t].item(), estimator)
            score = scores[b].item()
            score = score if score_clip is None else min(max(score, -score_clip), score_clip)
            reward = -0.1 * penalty + (score if t == steps[-1] else 0)
            assert (kl[b, t].item(), rewards[b, t].item()) == pytest.approx((penalty, reward), rel=1e-5, abs=1e-6)


def test_rewards_are_targets_and_no_mask_is_all_of_them(backend):
    scores = torch.randn(2, requires_grad=True)
    logprobs, ref = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    got = kl_shaped_rewards(scores, logprobs, ref, None, beta=0.1)
    assert not any(x.requires_grad for x in got)
    torch.testing.assert_close(got, kl_shaped_rewards(scores, logprobs, ref, torch.ones(2, 3), beta=0.1))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(backend, estimator):
    if backend != "reference":
        pytest.skip("float64 is the reference's")
    logprobs, ref = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: kl_penalty(a, b, estimator=estimator), (logprobs, ref))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": -0.1}, ValueError, r"beta: is -0.1, must be finite and in \[0.0"),
        ({"beta": True}, TypeError, "beta: is bool, must be a number"),
        ({"estimator": "k4"}, ValueError, "estimator: is 'k4', must be one of 'k1', 'k2', 'k3', 'abs'"),
        ({"scores": torch.zeros(3)}, ValueError, r"scores: has shape \(3,\), must be \(2,\)"),
        ({"ref_logprobs": torch.zeros(2, 3)}, ValueError, r"ref_logprobs: has shape \(2, 3\), must be \(2, 4\)"),
        ({"mask": torch.full((2, 4), 2)}, ValueError, r"mask: is 2 at position \(0, 0\), must be 0 or 1"),
        ({"mask": torch.full((2, 4), math.nan)}, ValueError, "mask: is nan at position .*, must be 0 or 1"),
        ({"mask": [[1]]}, TypeError, "mask: is list, must be a tensor"),
        ({"score_clip": 0}, ValueError, r"score_clip: is 0, must be finite and in \(0.0"),
        ({"logprobs": torch.zeros(4), "ref_logprobs": torch.zeros(4)}, ValueError, r"logprobs: .* must be \(B, T\)"),
    ],
)
def test_errors_name_the_argument(backend, arguments, error, message):
    call = {
        "scores": torch.zeros(2),
        "logprobs": torch.zeros(2, 4),
        "ref_logprobs": torch.zeros(2, 4),
        "mask": None,
        "beta": 0.1,
    } | oracles.here(arguments, message)
    with pytest.raises(error, match=message):
        kl_shaped_rewards(**call)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_infinite_log_probs_give_what_the_formula_gives(backend, estimator):
    inf = math.inf
    logprobs = torch.tensor([0.0, 0.0, -inf, -inf, -1.0, -200.0, -1.0], requires_grad=True)
    ref = torch.tensor([-inf, inf, -1.0, -inf, -200.0, -1.0, math.nan])
    got = kl_penalty(logprobs, ref, estimator=estimator)
    (gradient,) = torch.autograd.grad(got.sum(), logprobs)
    with use_backend("reference"):
        want = kl_penalty(logprobs, ref, estimator=estimator)
        (want_gradient,) = torch.autograd.grad(want.sum(), logprobs)
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(gradient, want_gradient, equal_nan=True)
