"""Every op of the table is in every place that must know it, and no other op is."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import NAMES, Recorder, calls

import rlhf_kernels as k
from rlhf_kernels import backends, registration
from rlhf_kernels.ops import FAMILIES, OPS

ROOT = Path(__file__).parents[2]
ALL = {name for op, facts in OPS.items() for name in (op, *facts.derivative)}
IN_CUDA = {name for op, facts in OPS.items() if "cuda" in facts.on_gpu for name in (op, *facts.derivative)}
native = pytest.mark.skipif(not backends.has("cpu"), reason="no native kernels in this install")


def registered(library, key):
    """The ops of a library that have a kernel under a dispatch key."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{library}::")}
    return {name.partition("::")[2] for name in names if has(name, key)}


@native
def test_schemas():
    source = (ROOT / "csrc/schemas.h").read_text()
    assert set(re.findall(r'library\.def\(\s*"(\w+)\(', source)) == ALL
    assert registered("rlhf_kernels", "CPU") >= ALL


@native
def test_gpus_have_a_kernel_for_compiled_code():
    assert registered("rlhf_kernels", "CUDA") >= ALL


@pytest.mark.skipif(not backends.emulated("cuda"), reason="CUDA kernels are not emulated here")
def test_cuda():
    assert registered("rlhf_kernels_emulated", "CPU") == IN_CUDA


@pytest.mark.skipif(not backends.has("triton"), reason="no Triton in this install")
def test_triton():
    from rlhf_kernels.triton import OPS as IN_TRITON

    assert IN_TRITON.keys() == ALL


@native
def test_fake_kernels():
    for name in ALL:
        assert torch._library.simple_registry.singleton.find(f"rlhf_kernels::{name}").fake_impl.kernel, name


@native
def test_derivatives_name_the_arguments_as_the_schema_does():
    for name in registration._DERIVATIVES:
        schema = getattr(torch.ops.rlhf_kernels, name).default._schema
        named = inspect.signature(registration._FAKES[name]).parameters
        assert tuple(named) == tuple(argument.name for argument in schema.arguments), name


def test_derivatives():
    assert {name for name, call in calls().items() if call.variables} >= set(registration._DERIVATIVES)
    assert {name for name, op in OPS.items() if op.derivative} <= set(registration._DERIVATIVES)


@native
def test_calls_reach_every_op():
    """An op that ``calls.py`` leaves out would not be tested for what all ops have in common."""
    in_place = {"selective_log_softmax_backward_"}  # test_log_prob has it
    with k.use_backend("cpu"), Recorder() as recorder:
        for call in calls().values():
            call.run()
    assert {op._schema.name.partition("::")[2] for op, _ in recorder.seen} == ALL - in_place


def test_public_functions():
    """Every op has a function of its name. Two have a second one, which also gives the entropy."""
    functions = set(k.__all__) - {"available_backends", "use_backend", "pack_sequences"}
    assert {name.removesuffix("_and_entropy") for name in functions} == set(OPS)
    assert set(calls()) == functions


def test_the_policy_losses_have_the_same_options():
    """An option of the one is easily forgotten in the other."""

    def options(function):
        return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}

    of_logits = {"bias", "temperature", "softcap", "entropy_coefficient"}
    of_log_probs = {"ratio_level"}  # the mean over a sequence is not known while its logits are made
    assert options(k.linear_ppo_policy_loss) == options(k.ppo_policy_loss) - of_log_probs | of_logits


@pytest.mark.parametrize("name", OPS)
def test_reference_and_benchmark(name):
    files = {path: path.read_text() for path in (ROOT / "rlhf_kernels/reference").glob("*.py")}
    assert any(f"def {name}" in text for text in files.values())
    assert any(name in path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_file_in_every_column(family):
    columns = ["rlhf_kernels/{}.py", "rlhf_kernels/reference/{}.py", "rlhf_kernels/triton/{}.py", "csrc/cpu/{}.cpp"]
    columns += ["csrc/cpu/ops/{}.cpp", "tests/kernels/test_{}.py", "benchmarks/{}.py"]
    if any("cuda" in op.on_gpu for op in OPS.values() if op.family == family):
        columns += ["csrc/cuda/{}.cu", "csrc/cuda/ops/{}.cpp"]
    assert [column for column in columns if not (ROOT / column.format(family)).exists()] == []


def test_statistics():
    """A call returns the statistics that the table names, and the kernel returns as many."""
    for name, op in OPS.items():
        if op.statistics:
            call = calls()[name]
            result = call.function(**call.tensors, **call.options)[1]
            assert tuple(result) == op.statistics


@pytest.mark.parametrize("kind", [np.float32, lambda x: torch.tensor(x, device="cpu")])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_numpy_and_0_d_tensors_are_numbers(name, kind):
    """Schedules and configurations have them."""
    call = calls()[name]
    plain = {n: 0.5 if n != "dual_clip" else 2.0 for n, x in call.options.items() if type(x) is float}
    call = call._replace(options=call.options | plain)
    other = call._replace(options=call.options | {n: kind(x) for n, x in plain.items()})
    assert all(torch.equal(a, b) for a, b in zip(call.run(), other.run(), strict=True))


def test_a_number_with_a_gradient_is_refused():
    call = calls()["selective_log_softmax"]
    with pytest.raises(TypeError, match="temperature: requires a gradient, and there is none in it"):
        call.function(**call.tensors, temperature=torch.tensor(0.7, requires_grad=True))
