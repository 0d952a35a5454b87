import math

import oracles
import pytest
import torch
from calls import fewer
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kernels import kl_shaped_rewards, masked_gae, ppo_advantages

RATES = st.sampled_from([0.0, 0.5, 0.95, 1.0])
WHITEN = st.sampled_from([False, True, "unbiased"])


def expected(rewards, values, mask, gamma, lam, bootstrap, whiten):
    rows = [
        oracles.gae(*row, gamma, lam, b)
        for *row, b in zip(rewards.tolist(), values.tolist(), mask.tolist(), bootstrap.tolist(), strict=True)
    ]
    advantages, returns = [row[0] for row in rows], [row[1] for row in rows]
    if whiten:
        advantages = oracles.whiten(advantages, mask.tolist(), whiten == "unbiased")
    return tuple(torch.tensor(x, dtype=torch.float64).reshape(mask.shape) for x in (advantages, returns))


def close(got, want, tolerance=2e-5):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


@given(oracles.batches(), RATES, RATES, WHITEN, st.sampled_from(oracles.DTYPES), st.integers(0, 2**31))
def test_padded_matches_loops(backend, mask, gamma, lam, whiten, dtype, seed):
    torch.manual_seed(seed)
    rewards, values = torch.randn(2, *mask.shape).to(dtype)
    bootstrap = torch.randn(mask.shape[0]).to(dtype)
    want = expected(rewards, values, mask, gamma, lam, bootstrap, whiten)
    got = masked_gae(
        oracles.garbage(rewards, mask),
        oracles.garbage(values, mask),
        mask,
        gamma=gamma,
        lam=lam,
        bootstrap=oracles.garbage(bootstrap, mask.bool().any(-1)),
        whiten=whiten,
    )
    assert got[0].dtype == got[1].dtype == torch.float32
    close(got, want, 1e-3 if whiten else 2e-5)  # whitening divides by a deviation that may be small
    assert all((x[~mask.bool()] == 0).all() for x in got)


@given(st.lists(st.integers(0, 6), max_size=5), RATES, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_packed_matches_loops_sequence_by_sequence(backend, lengths, lam, masked, wide, seed):
    torch.manual_seed(seed)
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int64 if wide else torch.int32)
    rewards, values = torch.randn(2, total)
    bootstrap = torch.randn(len(lengths))
    mask = torch.rand(total) < 0.6 if masked else None
    used = torch.ones(total) if mask is None else mask
    advantages, returns = masked_gae(
        oracles.garbage(rewards, used),
        oracles.garbage(values, used),
        mask,
        gamma=0.9,
        lam=lam,
        bootstrap=bootstrap,
        cu_seqlens=cu_seqlens,
    )
    assert advantages.shape == returns.shape == (total,)
    for s in range(len(lengths)):
        one = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        want = oracles.gae(
            rewards[one].tolist(), values[one].tolist(), used[one].tolist(), 0.9, lam, bootstrap[s].item()
        )
        assert advantages[one].tolist() == pytest.approx(want[0], rel=2e-5, abs=2e-5)
        assert returns[one].tolist() == pytest.approx(want[1], rel=2e-5, abs=2e-5)


def test_a_hand_computed_row(backend):
    """δ = (1 + 3 − 2, 0 + 0 − 3) = (2, −3) over positions 0 and 2; γ = 1, λ = ½ gives A = (2 − 1.5, −3)."""
    advantages, returns = masked_gae(
        torch.tensor([[1.0, 50.0, 0.0]]), torch.tensor([[2.0, 70.0, 3.0]]), torch.tensor([[1, 0, 1]]), lam=0.5
    )
    assert advantages.tolist() == [[0.5, 0, -3]]
    assert returns.tolist() == [[2.5, 0, 0]]


def test_gamma_and_lambda_of_one_give_returns_to_go(backend):
    rewards, values = torch.randn(2, 3, 40)
    _, returns = masked_gae(rewards, values, None, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(-1).cumsum(-1).flip(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whiten", [True, "unbiased"])
def test_whitened_advantages_have_mean_0_and_variance_1(backend, whiten):
    mask = torch.rand(5, 30) < 0.7
    plain = masked_gae(torch.randn(5, 30), torch.randn(5, 30), mask)
    torch.manual_seed(1)
    rewards, values = torch.randn(2, 5, 30)
    advantages, returns = masked_gae(rewards, values, mask, whiten=whiten)
    inside = advantages[mask].double()
    assert inside.mean().item() == pytest.approx(0, abs=1e-5)
    assert inside.var(unbiased=whiten == "unbiased").item() == pytest.approx(1, rel=1e-4)
    assert torch.equal(returns, masked_gae(rewards, values, mask)[1])
    assert not torch.equal(returns, plain[1])


@pytest.mark.parametrize("whiten", [True, "unbiased"])
@pytest.mark.parametrize("mask", [[[0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]])
def test_whitening_of_no_or_one_position_is_zero(backend, mask, whiten):
    advantages, _ = masked_gae(torch.randn(2, 3), torch.randn(2, 3), torch.tensor(mask), whiten=whiten)
    assert (advantages == 0).all()


def test_outputs_carry_no_gradient(backend):
    rewards, values = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    outputs = masked_gae(rewards, values, None, whiten=True)
    outputs += ppo_advantages(torch.randn(2, requires_grad=True), rewards, values, values, None, beta=0.1)
    assert not any(x.requires_grad for x in outputs)


@given(oracles.batches(), WHITEN, st.sampled_from(["k1", "k3"]), st.integers(0, 2**31))
def test_ppo_advantages_is_rewards_then_gae(backend, mask, whiten, estimator, seed):
    torch.manual_seed(seed)
    logprobs, ref, values = (oracles.garbage(x, mask) for x in torch.randn(3, *mask.shape))
    scores, bootstrap = torch.randn(2, mask.shape[0])
    advantages, returns, rewards, kl = ppo_advantages(
        scores,
        logprobs,
        ref,
        values,
        mask,
        beta=0.2,
        gamma=0.9,
        lam=0.8,
        whiten=whiten,
        bootstrap=bootstrap,
        estimator=estimator,
        score_clip=0.7,
    )
    want = kl_shaped_rewards(scores, logprobs, ref, mask, beta=0.2, estimator=estimator, score_clip=0.7)
    close((rewards, kl), [x.double() for x in want])
    close(
        (advantages, returns),
        expected(want[0], torch.where(mask.bool(), values, 0), mask, 0.9, 0.8, bootstrap, whiten),
        1e-3 if whiten else 2e-5,
    )


@given(st.lists(st.integers(0, 5), max_size=5), st.integers(0, 2**31))
def test_packed_and_padded_ppo_advantages_agree(backend, lengths, seed):
    torch.manual_seed(seed)
    padded = torch.zeros(4, len(lengths), 5)
    mask = torch.arange(5) < torch.tensor(lengths, dtype=torch.long)[:, None]
    flat = torch.randn(3, sum(lengths))
    for x, y in zip(padded, flat, strict=False):
        x[mask] = y
    scores = torch.randn(len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = ppo_advantages(scores, *flat, None, beta=0.1, cu_seqlens=cu_seqlens)
    rows = ppo_advantages(scores, *padded[:3], mask, beta=0.1)
    for p, r in zip(packed, rows, strict=True):
        torch.testing.assert_close(p, r[mask], rtol=1e-4, atol=1e-5)


def test_a_long_sequence(backend):
    rewards, values = torch.randn(2, 1, fewer(backend, 32768))
    advantages, _ = masked_gae(rewards, values, None, gamma=0.99, lam=0.95)
    running, following = 0.0, 0.0
    exact = []
    for r, v in zip(reversed(rewards[0].tolist()), reversed(values[0].tolist()), strict=True):
        running = r + 0.99 * following - v + 0.99 * 0.95 * running
        following = v
        exact.append(running)
    torch.testing.assert_close(
        advantages[0].double(), torch.tensor(exact[::-1], dtype=torch.float64), rtol=1e-4, atol=1e-5
    )


def test_float64_stays_float64(backend):
    if backend != "reference":
        pytest.skip("float64 is the reference's")
    rewards, values = torch.randn(2, 3, 20, dtype=torch.float64)
    got = masked_gae(rewards, values, None, whiten=True)
    close(got, expected(rewards, values, torch.ones(3, 20), 1.0, 0.95, torch.zeros(3), True), 1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gamma": 1.1}, ValueError, r"gamma: is 1.1, must be finite and in \[0.0, 1.0\]"),
        ({"lam": -1}, ValueError, r"lam: is -1, must be finite and in \[0.0, 1.0\]"),
        ({"values": torch.zeros(5)}, ValueError, r"values: has shape \(5,\), must be \(6,\)"),
        ({"values": torch.zeros(6).long()}, TypeError, "values: has dtype torch.int64, must be one of torch.float32"),
        ({"mask": torch.zeros(2)}, ValueError, r"mask: has shape \(2,\), must be \(6,\)"),
        ({"mask": torch.full((6,), 0.5)}, ValueError, r"mask: is 0.5 at position \(0,\), must be 0 or 1"),
        ({"bootstrap": torch.zeros(3)}, ValueError, r"bootstrap: has shape \(3,\), must be \(2,\)"),
        ({"cu_seqlens": None}, ValueError, r"rewards: has shape \(6,\), must be \(B, T\); give cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, ValueError, "cu_seqlens: goes from 0 to 5, must go from 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "cu_seqlens: decreases"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens: has dtype torch.float32, must be"),
        ({"cu_seqlens": torch.zeros(2, 2).int()}, ValueError, r"cu_seqlens: has shape \(2, 2\), must be"),
        ({"whiten": "yes"}, ValueError, "whiten: is 'yes', must be True, False or 'unbiased'"),
        ({"rewards": torch.zeros(2, 3)}, ValueError, r"rewards: has shape \(2, 3\), must be \(N,\)"),
    ],
)
def test_errors_name_the_argument(backend, arguments, error, message):
    call = {
        "rewards": torch.zeros(6),
        "values": torch.zeros(6),
        "mask": None,
        "cu_seqlens": torch.tensor([0, 2, 6]),
    } | oracles.here(arguments, message)
    with pytest.raises(error, match=message):
        masked_gae(**call)


def test_packed_sequences_of_very_unequal_lengths_are_what_they_are_alone(kernels):
    """There are more sequences than fit into a vector, and they are not ordered by length."""
    lengths = [1, 300, 0, 7, 64, 65, 2, 128, 1, 900, 3, 0, 16] * fewer(kernels, 3)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    rewards, values = torch.randn(2, sum(lengths))
    bootstrap = torch.randn(len(lengths))
    mask = torch.rand(sum(lengths)) < 0.8
    together = masked_gae(rewards, values, mask, gamma=0.9, bootstrap=bootstrap, cu_seqlens=cu_seqlens)
    for b, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        some = slice(begin, end)
        one = torch.tensor([0, end - begin])
        alone = masked_gae(
            rewards[some], values[some], mask[some], gamma=0.9, bootstrap=bootstrap[b : b + 1], cu_seqlens=one
        )
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[some], y)


def test_whitening_leaves_masked_positions_0_whatever_the_others_are(backend):
    rewards = torch.tensor([[1.0, math.nan, 2.0, 5.0]])
    advantages, returns = masked_gae(rewards, torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]]), whiten=True)
    assert advantages[0, :2].isnan().all()
    assert advantages[0, 3] == returns[0, 3] == 0
