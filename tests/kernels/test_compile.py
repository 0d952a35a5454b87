"""Losses made of the ops can be traced whole (``fullgraph=True``), and give the same values and gradients."""

import pytest
import torch
from calls import NAMES, bad_values, calls, packed_calls

import rlhf_kernels as k
from rlhf_kernels.backends import emulated
from rlhf_kernels.reference import gae, ranking_loss

B, T, D, V = 3, 5, 8, 11


@pytest.fixture
def backend(request, backend):
    """Compiled code on CPU tensors runs the CPU's kernels, so an emulated backend would have no part in it."""
    if emulated(backend) and request.node.callspec.params.get("is_compiled", True):
        pytest.skip("compiled code runs the CPU's kernels")
    return backend


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.fixture
def rollout():
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    return {
        "hidden": torch.randn(B, T, D, requires_grad=True),
        "weight": torch.randn(V, D, requires_grad=True),
        "values": torch.randn(B, T, requires_grad=True),
        "index": torch.randint(0, V, (B, T)),
        "old": -2 + 0.1 * torch.randn(B, T),
        "ref": -2 + 0.1 * torch.randn(B, T),
        "scores": torch.randn(B),
        "mask": mask,
    }


def ppo(hidden, weight, values, index, old, ref, scores, mask):
    advantages, returns, rewards, kl = k.ppo_advantages(scores, old, ref, values, mask, beta=0.1)
    logprobs, entropy = k.linear_selective_log_softmax_and_entropy(hidden, weight, index, mask=mask)
    policy, stats = k.ppo_policy_loss(logprobs, old, advantages, mask)
    fused, fused_stats = k.linear_ppo_policy_loss(hidden, weight, index, old, advantages, mask, dual_clip=3.0)
    value, value_stats = k.ppo_value_loss(values, values.detach() + 0.1, returns, mask)
    pretraining = k.linear_cross_entropy(hidden, weight, index)
    total = policy + 2 * fused + 0.1 * value + pretraining - 0.01 * entropy.mean() + rewards.sum() + kl.sum()
    return total, stats | fused_stats | {f"value_{name}": x for name, x in value_stats.items()}


def ranking(scores, ranks, offsets):
    return k.pairwise_ranking_loss(scores, ranks, offsets=offsets)


def packed(rewards, values, cu_seqlens):
    return k.masked_gae(rewards, values, None, whiten=True, cu_seqlens=cu_seqlens)


def packed_advantages(scores, logprobs, ref, values, cu_seqlens):
    return k.ppo_advantages(scores, logprobs, ref, values, None, beta=0.1, cu_seqlens=cu_seqlens)


def logits_loss(logits, index):
    a, h = k.selective_log_softmax_and_entropy(logits * 1, index, temperature=0.7, inplace_backward=True)
    return (k.kl_penalty(a, a.detach() - 1, estimator="k3") + h).sum()


def inductor(function):
    """A function as the default compiler compiles it."""
    compiled = torch.compile(function, fullgraph=True)

    def call(*arguments, **options):
        try:
            return compiled(*arguments, **options)
        except torch._inductor.exc.InductorError as error:
            if "compiler" in str(error).lower():
                pytest.skip("Inductor needs a C++ compiler on CPU")
            raise

    return call


@pytest.mark.long_for(backend=["reference"])
@pytest.mark.parametrize("name", NAMES)
def test_symbolic_sizes_and_options(backend, name):
    function = calls()[name].function
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, length in ((4, 7), (3, 11)):
        call = calls(rows, length)[name]
        for got, want in zip(call._replace(function=compiled).run(), call.run(), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inplace_backward_of_a_transposed_slice(backend, dynamic):
    def loss(logits, index, **options):
        return k.selective_log_softmax((logits * 1).transpose(0, 1)[1:], index, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (4, 5):
        logits, index = torch.randn(size, 6, 30 + size, requires_grad=True), torch.randint(0, 30, (5, size))
        got = torch.autograd.grad(compiled(logits, index, inplace_backward=True), logits)
        torch.testing.assert_close(got, torch.autograd.grad(loss(logits, index), logits))


@pytest.mark.runs("linear_ppo_policy_loss")
def test_a_ppo_loss_from_linear_log_probs(backend, rollout):
    loss, stats = ppo(**rollout)
    compiled_loss, compiled_stats = torch.compile(ppo, fullgraph=True, backend="aot_eager")(**rollout)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_stats, stats)
    variables = [rollout[name] for name in ("hidden", "weight", "values")]
    torch.testing.assert_close(torch.autograd.grad(compiled_loss, variables), torch.autograd.grad(loss, variables))


def test_flat_ranking_packed_gae_and_logits(backend):
    scores, ranks, offsets = (
        torch.randn(7, requires_grad=True),
        torch.tensor([1, 2, 3, 1, 1, 2, 1]),
        torch.tensor([0, 3, 7]),
    )
    compiled = torch.compile(ranking, fullgraph=True, backend="aot_eager")(scores, ranks, offsets)
    plain = ranking(scores, ranks, offsets)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled[0], scores), torch.autograd.grad(plain[0], scores))

    inputs = (*torch.randn(2, 7), offsets)
    torch.testing.assert_close(torch.compile(packed, fullgraph=True, backend="aot_eager")(*inputs), packed(*inputs))

    inputs = (torch.randn(2), *torch.randn(3, 7), offsets)
    compiled = torch.compile(packed_advantages, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, packed_advantages(*inputs))

    logits, index = torch.randn(7, 9, requires_grad=True), torch.arange(7)
    compiled = torch.compile(logits_loss, fullgraph=True, backend="aot_eager")(logits, index)
    plain = logits_loss(logits, index)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled, logits), torch.autograd.grad(plain, logits))


def test_inductor(backend, rollout):
    """The default compiler, on the part that is differentiated."""

    def loss(logits, index, old, mask):
        logprobs, entropy = k.selective_log_softmax_and_entropy(logits, index, mask=mask)
        return k.ppo_policy_loss(logprobs, old, old, mask)[0] - entropy.mean()

    logits = torch.randn(B, T, V, requires_grad=True)
    inputs = (logits, rollout["index"], rollout["old"], rollout["mask"])
    compiled = inductor(loss)(*inputs)
    torch.testing.assert_close(compiled, loss(*inputs))
    torch.testing.assert_close(torch.autograd.grad(compiled, logits), torch.autograd.grad(loss(*inputs), logits))


def test_the_opaque_ops_are_registered_correctly():
    offsets = torch.tensor([0, 2, 6])
    mask = torch.rand(2, 5) < 0.6
    rows, flat = torch.randn(2, 5), torch.randn(6)
    torch.library.opcheck(gae._masked_gae, (rows, rows, mask, 0.9, 0.95, torch.randn(2), "population", None))
    torch.library.opcheck(gae._masked_gae, (flat, flat, flat < 1, 0.9, 0.95, None, None, offsets))
    shaping = (0.1, 0.9, 0.95, "unbiased", None, "k3", 1.0)
    torch.library.opcheck(gae._ppo_advantages, (torch.randn(2), rows, rows, rows, mask, *shaping, None))
    torch.library.opcheck(gae._ppo_advantages, (torch.randn(2), flat, flat, flat, flat < 1, *shaping, offsets))
    ranks = torch.tensor([1, 2, 1, 3, 2, 2])
    torch.library.opcheck(ranking_loss._flat, (flat.requires_grad_(), ranks, offsets, 0.1))
    torch.library.opcheck(ranking_loss._flat_gradient, (flat.detach(), ranks, offsets, 0.1))
    torch.library.opcheck(torch.ops.rlhf_kernels.check_mask, (mask.t().double(), "mask"))
    torch.library.opcheck(torch.ops.rlhf_kernels.check_index, (ranks, ranks > 0, 4, "index"))
    torch.library.opcheck(torch.ops.rlhf_kernels.check_boundaries, (offsets, 6, "offsets"))


WITH_CHECKED_VALUES = [
    pytest.param(make, name, id=f"{make.__name__}-{name}")
    for make in (calls, packed_calls)
    for name, call in make().items()
    if any(bad_values(call))
]


@pytest.mark.long_for(backend=["reference"])
@pytest.mark.parametrize(("make", "name"), WITH_CHECKED_VALUES)
def test_values_that_do_not_fit_are_the_same_error_as_in_eager_code(backend, make, name):
    if torch.get_default_device().type == "cuda":
        pytest.skip("a GPU's values are not looked at")
    call = make()[name]
    compiled = call._replace(function=torch.compile(call.function, fullgraph=True, backend="aot_eager"))
    tried = set()
    for replaced, error, message in bad_values(call):
        # Compiling takes most of the time, so it is tried with one value of each argument.
        hows = (call, compiled) if replaced.keys() - tried else (call,)
        tried |= replaced.keys()
        for how in hows:
            with pytest.raises(error) as caught:
                how.run(**replaced)
            assert str(caught.value) == message


@pytest.mark.parametrize("name", ["selective_log_softmax", "masked_gae", "ppo_policy_loss"])
def test_inductor_keeps_the_checks(backend, name):
    """Inductor leaves out what no result needs, and a check must not be among that."""
    if torch.get_default_device().type == "cuda":
        pytest.skip("a GPU's values are not looked at")
    call = calls()[name]
    compiled = call._replace(function=inductor(call.function))
    for replaced, error, message in {next(iter(bad[0])): bad for bad in bad_values(call)}.values():
        with pytest.raises(error) as caught:
            compiled.run(**replaced)
        assert str(caught.value) == message


@pytest.mark.parametrize("double", ["scores", "logprobs", "ref_logprobs", "values", "bootstrap"])
def test_one_float64_among_the_inputs_has_the_dtypes_that_the_compiler_was_told(double):
    x = {"logprobs": torch.randn(2, 3), "ref_logprobs": torch.randn(2, 3), "values": torch.randn(2, 3)}
    x |= {"scores": torch.randn(2), "bootstrap": torch.randn(2)}
    x[double] = x[double].double()

    def function(x):
        return [2 * y for y in k.ppo_advantages(**x, mask=None, beta=0.1)]

    for got, want in zip(torch.compile(function, fullgraph=True)(x), function(x), strict=True):
        assert got.dtype == want.dtype == torch.float64
        torch.testing.assert_close(got, want)


# How many of the first results have a derivative. It is one for every other op that has a derivative.
DIFFERENTIABLE = {"selective_log_softmax_and_entropy": 2, "linear_selective_log_softmax_and_entropy": 2}


@pytest.mark.long_for(backend=["reference"])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_result_requires_grad_where_an_input_that_it_has_a_derivative_in_does(backend, name, is_compiled):
    call = calls(3, 5)[name]
    function = torch.compile(call.function, fullgraph=True, backend="aot_eager") if is_compiled else call.function
    tensors = {n: x.float() if "mask" in n else x for n, x in call.tensors.items()}
    floats = [n for n, x in tensors.items() if x.is_floating_point()]
    count = DIFFERENTIABLE.get(name, 1) if call.variables else 0
    alone = [[n] for n in floats]
    if is_compiled:  # each time anew, so what has no derivative is taken together
        alone = [*([n] for n in call.variables), [n for n in floats if n not in call.variables]]
    for required in (*alone, floats):
        inputs = {n: x.detach().requires_grad_(n in required) for n, x in tensors.items()}
        results = function(**inputs, **call.options)
        results = results if isinstance(results, tuple) else (results,)
        flat = [y for x in results for y in (x.values() if isinstance(x, dict) else [x])]
        expected = count if set(required) & set(call.variables) else 0
        assert [x.requires_grad for x in flat] == [i < expected for i in range(len(flat))], required
        if expected:
            gradients = torch.autograd.grad(flat[0].sum(), [inputs[n] for n in required], allow_unused=True)
            assert [x is not None for x in gradients] == [n in call.variables for n in required]
