"""The options that make GRPO, GSPO, CISPO and their relatives of the policy losses, against loops over floats."""

import itertools
import math

import oracles
import pytest
import torch
from calls import Call, fewer
from hypothesis import given
from hypothesis import strategies as st
from test_accuracy import hold

from rlhf_kernels import (
    linear_ppo_policy_loss,
    linear_selective_log_softmax_and_entropy,
    ppo_policy_loss,
    use_backend,
)
from rlhf_kernels.ops import OPS

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
OPTIONS = (
    {"log_ratio_clamp": 0.5},
    {"ratio_level": "sequence"},
    {"ratio_level": "sequence", "log_ratio_clamp": 0.2, "dual_clip": 1.5},
    {"surrogate": "cispo", "clip_range": 1.0, "clip_range_high": 4.0},
    {"surrogate": "cispo", "clip_range": 0.1, "log_ratio_clamp": 1.0},
    {"surrogate": "cispo", "ratio_level": "sequence"},
    {"dual_clip": 1.5, "log_ratio_clamp": 2.0},
    {"beta": 0.3},
    {"beta": 0.3, "ratio_level": "sequence", "clip_range_high": 0.4},
)


def position(logprob, log_ratio, advantage, ref, options):
    """One position's loss, its derivative in the log-prob, its k3, and whether the dual clip limits it."""
    limit, epsilon = options.get("log_ratio_clamp", math.inf), options.get("clip_range", 0.2)
    low, high = 1 - epsilon, 1 + options.get("clip_range_high", epsilon)
    old = logprob - min(max(log_ratio, -limit), limit)
    ratio = math.exp(logprob - old)
    limited = False
    if options.get("surrogate") == "cispo":
        slope = -min(max(ratio, low), high) * advantage
        loss = slope * logprob
    else:
        loss, _, cut = oracles.policy_loss(logprob, old, advantage, low, high, options.get("dual_clip"))
        slope = 0.0 if cut or abs(log_ratio) > limit else -advantage * ratio
        plain, _, _ = oracles.policy_loss(logprob, old, advantage, low, high, None)
        limited = loss < plain
    kl = math.exp(ref - logprob) - (ref - logprob) - 1
    beta = options.get("beta", 0.0)
    return loss + beta * kl, slope + beta * (1 - math.exp(ref - logprob)), kl, limited


def loops(tensors, mask, options, reduction):
    """The loss, the gradient as rows of lists, and the means of log-ratios, dual clips and k3."""
    losses, slopes, found = [], [], []
    for *row, keep in zip(*(x.tolist() for x in tensors), mask.tolist(), strict=True):
        ratios = [a - b for a, b, m in zip(row[0], row[1], keep, strict=True) if m]
        mean = sum(ratios) / max(1, len(ratios))
        losses.append([0.0] * len(keep))
        slopes.append([0.0] * len(keep))
        for t, (logprob, old, advantage, ref) in enumerate(zip(*row, strict=True)):
            if keep[t]:
                ratio = mean if options.get("ratio_level") == "sequence" else logprob - old
                losses[-1][t], slopes[-1][t], kl, limited = position(logprob, ratio, advantage, ref, options)
                found.append((logprob - old, limited, kl))
    number = sum(map(sum, mask.tolist())) if reduction == "token-mean" else sum(map(any, mask.tolist()))
    weights = [
        1 / max(1, number) / (max(1, sum(keep)) if reduction == "seq-mean-token-mean" else 1) for keep in mask.tolist()
    ]
    gradient = [[w * x for x in row] for w, row in zip(weights, slopes, strict=True)]
    means = [sum(column) / max(1, len(found)) for column in zip(*found, strict=True)] or [0.0] * 3
    return oracles.reduce(losses, mask.tolist(), reduction), gradient, means


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(oracles.batches(), st.sampled_from(REDUCTIONS), st.integers(0, 2**31))
def test_options_match_loops(backend, options, mask, reduction, seed):
    torch.manual_seed(seed)
    tensors = torch.randn(4, *mask.shape)
    tensors[1] = tensors[0] - 0.5 * tensors[1]  # ratios on both sides of every limit
    want, want_gradient, (log_ratio, limited, kl) = loops(tensors, mask, options, reduction)
    logprobs, old, advantages, ref = (oracles.garbage(x, mask) for x in tensors)
    logprobs.requires_grad_()
    reference = {"ref_logprobs": ref} if "beta" in options else {}
    loss, stats = ppo_policy_loss(logprobs, old, advantages, mask, reduction=reduction, **options, **reference)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(want, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient.cpu(), torch.tensor(want_gradient).reshape(mask.shape), rtol=1e-4, atol=1e-6)
    expected = {"log_ratio_mean": log_ratio}
    expected |= {"dual_clip_fraction": limited} if "dual_clip" in options else {}
    expected |= {"ref_kl": kl} if reference else {}
    got = {name: stats[name].item() for name in stats.keys() & {"log_ratio_mean", "dual_clip_fraction", "ref_kl"}}
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [9, 2500])
def test_long_rows_and_any_layout(backend, options, dtype, length):
    """The gradient of a row is that of its own mean, however many blocks it has and wherever it lies."""
    rows = fewer(backend, 64) // 2
    mask = torch.rand(rows, length) < 0.7
    logprobs = -5 * torch.rand(rows, length)
    old = logprobs + 0.3 * torch.randn(rows, length)
    tensors = {"logprobs": logprobs, "old_logprobs": old, "advantages": torch.randn(rows), "mask": mask}
    if "beta" in options:
        tensors["ref_logprobs"] = logprobs + 0.5 * torch.randn(rows, length)
    tensors = {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}
    call = Call(ppo_policy_loss, tensors, ("logprobs",), options)
    got = call.run(**{n: x.t().contiguous().t() for n, x in tensors.items() if x.dim() == 2})
    wide = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    with use_backend("reference"):
        want = call.run(**wide)
    for ours, truth in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=8e-3 if ours.dtype != torch.float32 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_no_error_is_larger_than_the_formula_s(kernels, options, spread):
    shape = (fewer(kernels, 64), 1024)
    logprobs = -5 * torch.rand(shape)
    tensors = {"logprobs": logprobs, "old_logprobs": logprobs + spread * torch.randn(shape)}
    tensors |= {"advantages": torch.randn(shape), "mask": torch.rand(shape) < 0.8}
    if "beta" in options:
        tensors["ref_logprobs"] = logprobs + min(spread, 4.0) * torch.randn(shape)
    hold(Call(ppo_policy_loss, tensors, ("logprobs",), options), 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(backend, options):
    if backend != "reference":
        pytest.skip("float64 is the reference's")
    logprobs, ref = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.7
    advantages = torch.randn(4).double()  # with one for a row, a token's own gradient is that of the sequence's ratio
    old = logprobs + 0.1 * torch.rand(4, 5).double() + 0.05
    reference = {"ref_logprobs": ref} if "beta" in options else {}
    if options.get("surrogate") == "cispo":  # a constant ratio is not what differences would see
        options = options | {"clip_range": 0.01, "clip_range_high": 0.01}
        old = logprobs + 0.5
    for reduction in ("token-mean", "seq-mean-token-mean"):
        assert torch.autograd.gradcheck(
            lambda x, r=reduction: ppo_policy_loss(x, old, advantages, mask, reduction=r, **options, **reference)[0],
            logprobs.requires_grad_(),
        )


@pytest.mark.runs("linear_ppo_policy_loss")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [x for x in OPTIONS if "ratio_level" not in x], ids=str)
@pytest.mark.parametrize("with_old", [False, True])
def test_the_linear_loss_is_the_loss_of_the_log_probs(backend, options, reduction, with_old):
    hidden, weight = torch.randn(3, 4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    index = torch.where(mask.bool(), torch.randint(0, 9, (3, 4)), -100)
    logprobs, entropy = linear_selective_log_softmax_and_entropy(hidden, weight, index, mask=mask)
    old = oracles.garbage(logprobs.detach() + 0.3 * torch.randn(3, 4), mask) if with_old else None
    options = options | {"reduction": reduction}
    if "beta" in options:
        options["ref_logprobs"] = oracles.garbage(logprobs.detach() + torch.randn(3, 4), mask)
    advantages = torch.randn(3)
    expected, stats = ppo_policy_loss(logprobs, old, advantages, mask, **options)
    # −c·H is minus itself under the same reduction: the log-probs of an on-policy loss have no part in its value.
    bonus, _ = ppo_policy_loss(entropy, None, torch.ones(3), mask, reduction=reduction, surrogate="cispo")
    for c in (0.0, 0.7, -0.2):
        loss, got = linear_ppo_policy_loss(
            hidden, weight, index, old, advantages, mask, entropy_coefficient=c, **options
        )
        torch.testing.assert_close(loss, expected + c * bonus)
        assert got.keys() == stats.keys() | {"entropy"}
        for name in stats:
            torch.testing.assert_close(got[name], stats[name])
        gradients, want = (
            torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (loss, expected + c * bonus)
        )
        torch.testing.assert_close(gradients, want, rtol=1e-4, atol=1e-6)


def test_linear_gradcheck_with_every_option(backend):
    if backend != "reference":
        pytest.skip("float64 is the reference's")
    hidden, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3)))
    index, mask = torch.tensor([0, 1, 4, 2]), torch.tensor([1, 0, 1, 1])
    old, ref, advantages = torch.full((4,), -1.5).double(), torch.randn(4).double(), torch.randn(4).double()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_ppo_policy_loss(
            h, w, index, old, advantages, mask, ref_logprobs=ref, beta=0.2, entropy_coefficient=0.3, log_ratio_clamp=9
        )[0],
        (hidden, weight),
    )


@pytest.mark.runs("linear_ppo_policy_loss")
def test_without_old_log_probs_every_ratio_is_one(backend):
    logprobs, advantages = -torch.rand(3, 4), torch.randn(3, 4)
    logprobs.requires_grad_()
    loss, stats = ppo_policy_loss(logprobs, None, advantages, None)
    assert loss.item() == pytest.approx(-advantages.mean().item(), rel=1e-5, abs=1e-7)
    assert stats["ratio_mean"] == 1
    assert stats["approx_kl"] == stats["ratio_max_deviation"] == 0
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -advantages / 12)
    banned = torch.tensor([-math.inf, 0.0, 0.0])  # it can't have been sampled from this policy
    loss, _ = ppo_policy_loss(banned, None, torch.ones(3), None)
    linear, _ = linear_ppo_policy_loss(
        torch.zeros(1, 6), torch.zeros(3, 6), torch.tensor([0]), None, torch.ones(1), None, bias=banned
    )
    assert loss.isnan()
    assert linear.isnan()


def test_a_clamped_log_ratio_has_no_gradient_beyond_and_one_at_the_limit(backend):
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = logprobs.detach() - torch.tensor([-2.5, -2.0, 0.0, 2.0, 2.5])
    loss, stats = ppo_policy_loss(
        logprobs, old, torch.tensor([1.0, 1, 1, -1, -1]), None, log_ratio_clamp=2, clip_range=1
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    ratios = [math.exp(-2), math.exp(-2), 1, math.exp(2), math.exp(2)]
    assert gradient.tolist() == pytest.approx([0, -ratios[1] / 5, -1 / 5, ratios[3] / 5, 0], rel=1e-6)
    assert stats["ratio_mean"].item() == pytest.approx(sum(ratios) / 5, rel=1e-6)


@pytest.mark.parametrize("position", [0, 3, 20])
def test_nan_shows_in_its_sequence_alone(backend, position):
    logprobs = torch.zeros(3, 37)
    logprobs[1, position] = math.nan
    logprobs.requires_grad_()
    mask = torch.ones(3, 37)
    mask[1, 30:] = 0
    loss, _ = ppo_policy_loss(logprobs, torch.zeros(3, 37), torch.ones(3), mask, ratio_level="sequence")
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.isnan()
    assert torch.equal(gradient.isnan(), (mask * torch.tensor([[0], [1], [0]])).bool())


@pytest.mark.parametrize(
    "options", [{"ratio_level": "sequence"}, {"surrogate": "cispo"}, {"ref_logprobs": True, "beta": 0.2}], ids=str
)
def test_a_banned_token_gives_what_the_formula_gives(backend, options):
    """−inf under the policy, under the old one, and under the reference."""
    logprobs = torch.tensor([[-1.0, -math.inf, -2.0], [-1.0, -2.0, -3.0], [-1.0, -0.5, -0.1]], requires_grad=True)
    old = torch.tensor([[-1.1, -3.0, -2.0], [-1.0, -2.5, -3.0], [-1.0, -math.inf, -0.2]])
    if "ref_logprobs" in options:
        options = options | {
            "ref_logprobs": torch.tensor([[-1.0, -2.0, -2.0], [-1.0, -math.inf, -3.0], [-1.0, -1, -1]])
        }
    for row in range(3):
        rows = {n: x[row : row + 1] for n, x in options.items() if n == "ref_logprobs"}
        arguments = (logprobs[row : row + 1], old[row : row + 1], torch.ones(1), None)
        loss, _ = ppo_policy_loss(*arguments, **options | rows)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        with use_backend("reference"):
            want, _ = ppo_policy_loss(*arguments, **options | rows)
            (want_gradient,) = torch.autograd.grad(want, logprobs)
        torch.testing.assert_close(loss, want, equal_nan=True)
        torch.testing.assert_close(gradient, want_gradient, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_nothing_unmasked_is_zero(backend, shape):
    x = torch.full(shape, math.nan, requires_grad=True)
    for options in OPTIONS:
        loss, stats = ppo_policy_loss(
            x, x, torch.zeros(shape[0]), torch.zeros(shape), ref_logprobs=x.detach(), **options
        )
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss == 0
        assert (gradient == 0).all()
        assert all(s == 0 for s in stats.values())


@pytest.mark.runs("linear_ppo_policy_loss")
def test_without_beta_the_reference_is_reported_alone(backend):
    logprobs = torch.tensor([-1.0, -200.0, -2.0], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -2.0])  # e^199 is infinite
    plain, _ = ppo_policy_loss(logprobs, logprobs.detach(), torch.ones(3), None)
    loss, stats = ppo_policy_loss(logprobs, logprobs.detach(), torch.ones(3), None, ref_logprobs=ref)
    assert torch.equal(loss, plain)
    assert torch.equal(*(torch.autograd.grad(x, logprobs)[0] for x in (loss, plain)))
    assert stats["ref_kl"] == math.inf
    hidden, weight = 200 * torch.ones(1, 1), torch.tensor([[1.0], [-1.0]])
    arguments = hidden, weight, torch.tensor([1]), None, torch.ones(1), None
    linear, stats = linear_ppo_policy_loss(*arguments, ref_logprobs=torch.tensor([-1.0]))
    assert linear == linear_ppo_policy_loss(*arguments)[0] == -1
    assert stats["ref_kl"] == math.inf


def test_the_reference_s_log_probs_are_a_constant(backend):
    logprobs, ref = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    loss, _ = ppo_policy_loss(logprobs, logprobs.detach(), torch.ones(2), None, ref_logprobs=ref, beta=0.1)
    assert torch.autograd.grad(loss, ref, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "ppo"}, "surrogate: is 'ppo', must be one of 'clipped', 'cispo'"),
        ({"ratio_level": "row"}, "ratio_level: is 'row', must be one of 'token', 'sequence'"),
        ({"ratio_level": "sequence"}, r"ratio_level: is 'sequence', which needs \(B, T\) inputs; these have 1"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip: is 3.0 with surrogate 'cispo'"),
        ({"log_ratio_clamp": 0}, r"log_ratio_clamp: is 0, must be finite and in \(0.0"),
        ({"beta": 0.1}, "beta: is 0.1 without ref_logprobs"),
        ({"beta": -0.1, "ref_logprobs": lambda: torch.zeros(4)}, r"beta: is -0.1, must be finite and in \[0.0"),
        ({"beta": 0.1, "ref_logprobs": lambda: torch.zeros(3)}, r"ref_logprobs: has shape \(3,\), must be \(4,\)"),
        (
            {"advantages": lambda: torch.zeros(3)},
            r"advantages: has shape \(3,\), must be \(4,\)",
        ),
        ({"clip_range_high": 4.0}, r"clip_range_high: is 4.0, must be finite and in \(0.0, 1.0\]"),
    ],
)
@pytest.mark.runs("linear_ppo_policy_loss")
def test_errors_name_the_argument(backend, options, message):
    zeros = torch.zeros(4)
    with pytest.raises(ValueError, match=message):
        ppo_policy_loss(zeros, zeros, **{"advantages": zeros, "mask": None} | oracles.here(options))
    if "ratio_level" not in options:
        with pytest.raises(ValueError, match=message):
            linear_ppo_policy_loss(
                torch.zeros(4, 6), torch.zeros(3, 6), zeros.long(), zeros,
                **{"advantages": zeros, "mask": None} | oracles.here(options),
            )  # fmt: skip


def test_advantages_of_a_row_are_not_taken_for_those_of_a_square(backend):
    """(B,) with B = T is one per row too."""
    logprobs = torch.randn(3, 3)
    got, _ = ppo_policy_loss(
        logprobs, logprobs, torch.tensor([1.0, 2, 3]), torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]])
    )
    assert got.item() == pytest.approx(-(3 * 1 + 3) / 4)


def test_every_combination_runs(backend):
    """Each option is a branch of a kernel, and some of them meet."""
    logprobs, old, ref = torch.randn(3, 2, 5)
    advantages, mask = torch.randn(2, 5), torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    for surrogate, level, clamp, beta, reduction in itertools.product(
        ("clipped", "cispo"), ("token", "sequence"), (None, 0.4), (0.0, 0.5), REDUCTIONS
    ):
        options = {"surrogate": surrogate, "ratio_level": level, "log_ratio_clamp": clamp, "reduction": reduction}
        options |= {"beta": beta, "ref_logprobs": ref}
        call = Call(
            ppo_policy_loss,
            dict(
                zip(("logprobs", "old_logprobs", "advantages", "mask"), (logprobs, old, advantages, mask), strict=True)
            ),
            ("logprobs",),
            options,
        )
        got = call.run()
        with use_backend("reference"):
            want = call.run()
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_statistics_have_the_names_that_the_table_of_ops_has():
    a = torch.randn(2, 3)
    _, statistics = ppo_policy_loss(a, a, a, None, dual_clip=2.0, ref_logprobs=a)
    assert tuple(statistics) == OPS["ppo_policy_loss"].statistics
    hidden, weight, index = torch.randn(2, 3, 4), torch.randn(5, 4), torch.ones(2, 3, dtype=torch.long)
    _, statistics = linear_ppo_policy_loss(hidden, weight, index, a, a, None, dual_clip=2.0, ref_logprobs=a)
    assert tuple(statistics) == OPS["linear_ppo_policy_loss"].statistics
