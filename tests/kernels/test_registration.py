"""What torch knows of the native ops: schemas, fake kernels and derivatives."""

import subprocess
from pathlib import Path

import pytest
import torch
from calls import NAMES, Recorder, calls
from torch._subclasses import FakeTensor, FakeTensorMode

import rlhf_kernels as k
from rlhf_kernels import backends

pytestmark = pytest.mark.skipif(not backends.has("cpu"), reason="no native kernels in this install")


@pytest.fixture
def native():
    with k.use_backend("cpu"):
        yield


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(native, name, mask_dtype):
    """Checks the ops that the public function calls, forward and backward, with the arguments that it gives them."""
    call = calls()[name]
    masks = {n: x.to(mask_dtype) for n, x in call.tensors.items() if x.dtype == torch.bool}
    if not masks and mask_dtype != torch.bool:
        pytest.skip("takes no mask")
    with Recorder() as recorder:
        call.run(**masks)
    assert recorder.seen
    for op, arguments in recorder.seen:
        torch.library.opcheck(op, arguments)
        forward = "backward" not in op.name()
        if forward and call.variables:
            names = [a.name for a in op._schema.arguments]
            differentiable = tuple(
                x.requires_grad_() if name in call.variables else x for name, x in zip(names, arguments, strict=True)
            )
            torch.library.opcheck(op, differentiable)


def test_opcheck_in_place(native):
    arguments = (torch.randn(3, 7), torch.tensor([1, 2, 3]), torch.tensor([True, False, True]), -100, 0.7)
    saved = (torch.rand(3), torch.rand(3), torch.rand(3), torch.rand(3), torch.rand(3))
    torch.library.opcheck(torch.ops.rlhf_kernels.selective_log_softmax_backward_, (*arguments, *saved))


@pytest.mark.parametrize("name", [n for n in NAMES if calls()[n].variables])
def test_gradcheck(native, name):
    """Compares with finite differences. The kernels compute in float32, so steps are wide and tolerances loose."""
    call = calls(2, 3)[name]
    tensors = dict(call.tensors)
    if "logits" in tensors:
        tensors["logits"] = tensors["logits"][..., :11].contiguous()
        tensors["index"] = tensors["index"] % 11
    if "weight" in tensors:
        tensors["weight"], tensors["hidden"] = tensors["weight"][:11, :5].contiguous(), tensors["hidden"][..., :5]
        key = "labels" if "labels" in tensors else "index"
        tensors[key] = torch.where(tensors[key] < 0, tensors[key], tensors[key] % 11)
        if "bias" in tensors:
            tensors["bias"] = tensors["bias"][:11]
    if "old_logprobs" in tensors:  # near the policy's, and away from the kinks of the clipped loss
        tensors["old_logprobs"] = torch.full_like(tensors["old_logprobs"], -2.4 if "hidden" in tensors else 0.0)
    variables = [tensors[n].clone().contiguous().requires_grad_() for n in call.variables]

    def function(*values):
        results = call.function(**(tensors | dict(zip(call.variables, values, strict=True))), **call.options)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(x for x in results if isinstance(x, torch.Tensor) and x.requires_grad)

    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(function, variables, eps=2e-3, atol=6e-3, rtol=2e-2, nondet_tol=0.0)


@pytest.mark.parametrize("name", [n for n in NAMES if calls()[n].variables])
def test_second_derivatives_say_that_there_are_none(native, name):
    call = calls(2, 3)[name]
    tensors = {n: x.clone().requires_grad_(n in call.variables) for n, x in call.tensors.items()}
    results = call.function(**tensors, **call.options)
    first = results[0] if isinstance(results, tuple) else results
    variable = tensors[call.variables[0]]
    (gradient,) = torch.autograd.grad(first.sum(), variable, create_graph=True)
    with pytest.raises(RuntimeError, match=r"has no second derivative on this backend"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(native, name):
    call = calls()[name]
    with Recorder() as recorder:
        call.run()
    for op, arguments in recorder.seen:
        real = op(*arguments)
        fake = op(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
        for a, b in zip(*((x if isinstance(x, tuple | list) else (x,)) for x in (real, fake)), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_the_library_needs_no_symbol_outside_the_stable_abi():
    """The library is built once and loaded by every later torch, so it must use nothing of libtorch's C++ interface."""
    library = Path(backends.__file__).with_name("_ops.so")
    try:
        listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("needs nm, from binutils")
    names = [line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines()]
    stable = ("aoti_torch_", "torch_", "Sleef_")
    torchs = [n for n in names if n.startswith(stable)]
    assert any(n.startswith("aoti_torch_") for n in torchs)
    foreign = [n for n in names if ("c10" in n or "at6" in n or "2at" in n or "torch" in n) and n not in torchs]
    assert foreign == []


def test_forward_mode_says_that_it_is_not_there(native):
    x = torch.randn(3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(3))
        with pytest.raises(RuntimeError, match="kl_penalty has no forward-mode derivative on this backend"):
            k.kl_penalty(dual, x)
        assert torch.equal(k.kl_penalty(x, x), torch.zeros(3))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda y: k.kl_penalty(y, x), (x,), (torch.ones(3),))


def test_transforms_are_refused_in_words(native):
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"kl_penalty takes whole batches, and none of torch\.func's transforms"):
        torch.vmap(k.kl_penalty)(x, x)
    with pytest.raises(RuntimeError, match="takes whole batches"):
        torch.func.grad(lambda y: k.kl_penalty(y, x).sum())(x)


@pytest.mark.parametrize("name", ["kl_penalty", "ppo_policy_loss", "linear_cross_entropy"])
def test_compiled_transforms_are_no_silent_zeros(native, name):
    call = calls()[name]
    variable = next(iter(call.variables))

    def total(x):
        return sum(result.sum() for result in call.run(**{variable: x}) if result.requires_grad or result.dim() == 0)

    x = call.tensors[variable].detach()
    for derivative in (
        lambda x: torch.func.grad(total)(x),
        lambda x: torch.func.jvp(total, (x,), (torch.ones_like(x),))[1],
    ):
        with pytest.raises(RuntimeError):
            torch.compile(derivative, backend="aot_eager")(x)


def test_several_gradients_at_once(native):
    """As ``jacobian(vectorize=True)`` asks for them."""
    logprobs = torch.randn(2, 3, requires_grad=True)
    loss, _ = k.ppo_policy_loss(logprobs, torch.randn(2, 3), torch.randn(2, 3), None)
    (one,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (both,) = torch.autograd.grad(loss, logprobs, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    assert torch.equal(both, torch.stack([one, 2 * one]))


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_give_the_shapes(native, name):
    """As tools do that plan memory or trace a model."""
    call = calls()[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        results = call.run(**{n: mode.from_tensor(x) for n, x in call.tensors.items()})
    for fake, real in zip(results, call.run(), strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
