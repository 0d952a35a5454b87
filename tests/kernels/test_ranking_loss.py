import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kernels import pairwise_ranking_loss, use_backend

PROMPTS = st.lists(
    st.lists(st.tuples(st.sampled_from([-2.0, 0.0, 0.5, 3.0, 1e4, -1e4]), st.integers(1, 4)), max_size=9), max_size=5
)


def expected(prompts, margin):
    results = [oracles.ranking([s for s, _ in p], [r for _, r in p], margin or 0.0) for p in prompts]
    results = [r for r in results if r is not None]
    return tuple(sum(column) / len(results) for column in zip(*results, strict=True)) if results else (0.0, 0.0)


@given(PROMPTS, st.sampled_from([None, 0.5]), st.sampled_from([torch.int64, torch.int32]))
def test_flat_and_padded_match_loops(backend, prompts, margin, rank_dtype):
    want = expected(prompts, margin)
    lengths = [len(p) for p in prompts]
    flat = torch.tensor([c for p in prompts for c in p], dtype=torch.float32).reshape(-1, 2)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    scores = flat[:, 0].clone().requires_grad_()
    loss, accuracy = pairwise_ranking_loss(scores, flat[:, 1].to(rank_dtype), offsets=offsets, margin=margin)
    assert (loss.item(), accuracy.item()) == pytest.approx(want, rel=1e-5, abs=1e-6)
    loss.backward()

    width = max(lengths, default=0) + 1
    mask = torch.arange(width) < torch.tensor(lengths, dtype=torch.long)[:, None]
    padded, ranks = torch.full(mask.shape, math.nan), torch.ones(mask.shape)
    padded[mask], ranks[mask] = flat[:, 0], flat[:, 1]
    padded.requires_grad_()
    loss, accuracy = pairwise_ranking_loss(padded, ranks.to(rank_dtype), mask=mask, margin=margin)
    assert (loss.item(), accuracy.item()) == pytest.approx(want, rel=1e-5, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(padded.grad[mask], scores.grad)
    assert (padded.grad[~mask] == 0).all()


def test_the_papers_worked_example(backend):
    scores = torch.tensor([[2.0, 0.5]])
    loss, accuracy = pairwise_ranking_loss(scores, torch.tensor([[1, 2]]))
    assert round(loss.item(), 2) == 0.20
    assert accuracy == 1
    loss, accuracy = pairwise_ranking_loss(scores, torch.tensor([[2, 1]]))
    assert round(loss.item(), 2) == 1.70
    assert accuracy == 0


def test_k_completions_equal_the_mean_over_their_pairs(backend):
    scores, ranks = torch.randn(4), torch.tensor([3, 1, 4, 2])
    pairs = torch.combinations(torch.arange(4))
    assert len(pairs) == 6
    loss, accuracy = pairwise_ranking_loss(scores[None], ranks[None])
    by_pair, accuracy_by_pair = pairwise_ranking_loss(scores[pairs], ranks[pairs])
    torch.testing.assert_close((loss, accuracy), (by_pair, accuracy_by_pair))


def test_equal_scores_count_half(backend):
    loss, accuracy = pairwise_ranking_loss(torch.ones(1, 3), torch.tensor([[1, 2, 2]]))
    assert accuracy == 0.5
    assert loss.item() == pytest.approx(math.log(2))


def test_a_prompt_without_a_pair_changes_nothing(backend):
    scores, ranks = torch.randn(3, 4), torch.tensor([[1, 2, 3, 4], [2, 2, 2, 2], [4, 1, 1, 2]])
    got = pairwise_ranking_loss(scores, ranks)
    want = pairwise_ranking_loss(scores[[0, 2]], ranks[[0, 2]])
    torch.testing.assert_close(got, want)
    assert pairwise_ranking_loss(scores, torch.full((3, 4), 2)) == (0, 0)  # all ranks are tied


def test_gradcheck(backend):
    if backend != "reference":
        pytest.skip("float64 is the reference's")
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ranks, mask = torch.tensor([[1, 2, 3, 4], [1, 1, 2, 3], [2, 2, 2, 2]]), torch.rand(3, 4) < 0.8
    assert torch.autograd.gradcheck(lambda s: pairwise_ranking_loss(s, ranks, mask=mask, margin=0.3)[0], scores)
    flat = scores.detach().flatten().requires_grad_()
    offsets = torch.tensor([0, 3, 3, 12], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda s: pairwise_ranking_loss(s, ranks.flatten(), offsets=offsets)[0], flat)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_gradients_have_the_dtype_of_the_scores(backend, dtype):
    scores, ranks = torch.randn(6).to(dtype).requires_grad_(), torch.tensor([1, 2, 3, 2, 1, 1])
    loss, accuracy = pairwise_ranking_loss(scores, ranks, offsets=torch.tensor([0, 3, 6]))
    (flat,) = torch.autograd.grad(loss, scores)
    padded_loss, _ = pairwise_ranking_loss(scores.view(2, 3), ranks.view(2, 3))
    (padded,) = torch.autograd.grad(padded_loss, scores)
    assert loss.dtype == accuracy.dtype == torch.float32
    assert flat.dtype == padded.dtype == dtype
    assert not accuracy.requires_grad
    torch.testing.assert_close(flat, padded)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ranks": torch.arange(3)}, ValueError, r"ranks: has shape \(3,\), must be \(4,\)"),
        (
            {"ranks": torch.zeros(4)},
            TypeError,
            "ranks: has dtype torch.float32, must be one of torch.int64, torch.int32",
        ),
        ({"ranks": torch.zeros(4).bool()}, TypeError, "ranks: has dtype torch.bool, must be one of torch.int64"),
        ({"offsets": torch.tensor([0, 5])}, ValueError, "offsets: goes from 0 to 5, must go from 0 to 4"),
        ({"offsets": torch.tensor([], dtype=torch.long)}, ValueError, r"offsets: has shape \(0,\), must be"),
        ({"margin": math.inf}, ValueError, "margin: is inf, must be finite"),
        ({"mask": torch.zeros(2)}, ValueError, "mask: is given with offsets, must be None"),
        ({"mask": torch.zeros(2), "offsets": None}, ValueError, r"scores: has shape \(4,\), must be \(B, K\)"),
        ({"scores": torch.zeros(2, 2)}, ValueError, r"ranks: has shape \(4,\), must be \(2, 2\)"),
    ],
)
def test_errors_name_the_argument(backend, arguments, error, message):
    call = {"scores": torch.zeros(4), "ranks": torch.arange(4), "offsets": torch.tensor([0, 4])} | oracles.here(
        arguments, message
    )
    with pytest.raises(error, match=message):
        pairwise_ranking_loss(**call)


def test_the_call_for_chosen_and_rejected_is_in_the_error(backend):
    chosen, rejected = torch.randn(2, 5)
    with pytest.raises(TypeError) as caught:
        pairwise_ranking_loss(chosen, rejected)
    loss, accuracy = eval(str(caught.value).partition("completions: ")[2])
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(chosen - rejected).mean())
    assert accuracy == (chosen > rejected).float().mean()


def test_scores_that_cannot_be_compared_count_half(backend):
    ranks = torch.tensor([[1, 2, 3, 4]])
    for scores in ([1.0, math.nan, 2.0, 0.3], [math.inf, math.inf, 1.0, 0.0], [-math.inf, 0.0, 0.0, 1.0]):
        got = pairwise_ranking_loss(torch.tensor([scores]), ranks)
        with use_backend("reference"):
            want = pairwise_ranking_loss(torch.tensor([scores]), ranks)
        torch.testing.assert_close(got, want, equal_nan=True)


def test_a_second_derivative_is_refused(backend):
    scores = torch.randn(4, requires_grad=True)
    loss, _ = pairwise_ranking_loss(scores, torch.arange(4), offsets=torch.tensor([0, 4]))
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
