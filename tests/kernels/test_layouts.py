"""Strides, empty sizes and instruction sets change nothing."""

import os
import re
import subprocess
import sys

import oracles
import pytest
import torch
from calls import NAMES, calls, fewer, interpreted, lacks
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf_kernels import backends, checks, masked_gae, ppo_value_loss


@st.composite
def relaid(draw, x):
    """The same values in another layout: a slice of something larger, spread out, transposed, or shifted in memory."""
    if x.dim() == 0 or (x.dtype.is_floating_point is False and x.dim() == 1):
        return x
    kind = draw(st.sampled_from(("same", "slice", "spread", "transposed", "shifted")))
    if kind == "slice":
        larger = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))
        larger[..., 1:-2] = x
        return larger[..., 1:-2]
    if kind == "spread":
        larger = x.new_zeros((*x.shape[:-1], x.shape[-1] * 2))
        larger[..., ::2] = x
        return larger[..., ::2]
    if kind == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "shifted":  # the data begin at another alignment
        flat = x.new_zeros(x.numel() + 5)
        flat[3 : 3 + x.numel()] = x.flatten()
        return flat[3 : 3 + x.numel()].view(x.shape)
    return x


@given(st.data(), st.sampled_from(NAMES), st.integers(1, 5), st.integers(1, 40), st.sampled_from(oracles.DTYPES))
def test_strides(backend, data, name, rows, length, dtype):
    assume(not lacks(backend, name))
    call = calls(rows, length, dtype)[name]
    want = call.run()
    got = call.run(**{n: data.draw(relaid(x), label=n) for n, x in call.tensors.items()})
    for a, b in zip(got, want, strict=True):
        # The order of sums is another one where tokens do not lie back to back. The reference's depends on all strides.
        a_sum = name == "ppo_value_loss" and a.dim() == 0
        allowed = {"rtol": 5e-7, "atol": 1e-7} if a_sum else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a, b, **({} if backend == "reference" else allowed))


@pytest.mark.parametrize("shape", [(5, 1), (1, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_the_stride_of_a_single_entry_says_nothing(backend, name, shape):
    """torch calls such tensors contiguous, whatever that stride is."""
    call = calls(*shape)[name]
    odd = {
        n: x.as_strided(x.shape, [7 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)])
        for n, x in call.tensors.items()
    }
    assert all(x.is_contiguous() for x in odd.values())
    for got, want in zip(call.run(**odd), call.run(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.long_for(backend=["triton"])
@pytest.mark.parametrize("name", NAMES)
def test_an_expanded_mask_is_that_mask(backend, name):
    call = calls(fewer(backend, 5), 33)[name]
    if "mask" not in call.tensors:
        pytest.skip("takes no mask")
    mask = (torch.rand(33) < 0.5).expand_as(call.tensors["mask"])
    got, want = call.run(mask=mask), call.run(mask=mask.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def laid_out(mask):
    """The same mask as it is, as a slice, spread out and transposed."""
    padded = torch.nn.functional.pad(mask, (1, 2), value=1)
    return mask, padded[:, 1:-2], mask.repeat_interleave(2, 1)[:, ::2], mask.t().contiguous().t()


@pytest.mark.parametrize("name", [n for n in NAMES if "mask" in calls()[n].tensors])
def test_masks_of_every_dtype_and_layout_are_that_mask(backend, name):
    call = calls(*(5, 70) if backend == "cpu" else (2, 5))[name]
    want = call.run()
    for number, dtype in enumerate(checks.MASKS):
        mask = call.tensors["mask"].to(dtype)
        signed = torch.where(mask == 0, -0.0, mask).to(dtype) if dtype.is_floating_point else mask
        layouts = laid_out(signed)
        for same in layouts[number % 4 :][:1] if interpreted(backend) else layouts:
            got = call.run(mask=same)
            # The order of the reference's sums depends on strides.
            torch.testing.assert_close(got, want, **({} if backend == "reference" else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.int64])
def test_of_several_bad_entries_the_first_is_named(backend, layout, dtype):
    """It does not matter which thread finds which entry first."""
    if torch.get_default_device().type == "cuda":
        pytest.skip("a GPU's values are not looked at")
    size, length = (300, 1024) if backend == "cpu" else (3, 7)
    x, mask = torch.zeros(size, length), torch.ones(size, length, dtype=dtype)
    mask[size - 1, 2] = mask[size // 2, 3] = mask[size // 2, 5] = 2
    with pytest.raises(ValueError, match=rf"mask: is 2(\.0)? at position \({size // 2}, 3\), must be 0 or 1"):
        masked_gae(x, x, laid_out(mask)[layout])


@given(st.floats() | st.integers(-(2**63), 2**63 - 1))
def test_a_bad_value_is_written_as_python_writes_it(backend, value):
    assume(value not in (0, 1) and torch.get_default_device().type == "cpu")
    dtype = torch.float64 if isinstance(value, float) else torch.int64
    with pytest.raises(ValueError, match=rf"^mask: is {re.escape(str(value))} at position \(0,\), must be 0 or 1$"):
        ppo_value_loss(*torch.zeros(3, 1), torch.tensor([value], dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_empty_sizes(backend, name, shape):
    call = calls(1, 1)[name]
    empty = {}
    for n, x in call.tensors.items():
        if n in ("weight", "bias"):
            empty[n] = x
        elif x.dim() == 1:
            empty[n] = x.new_zeros(shape[0])
        else:
            empty[n] = x.new_zeros((*shape, *x.shape[2:]))
    for result in call.run(**empty):
        assert not result.isnan().any()


ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline", "neon")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_reference_values(isa):
    """Runs in a new process, since the kernels are picked only once, when they are first used."""
    if backends.missing("cpu"):
        pytest.skip("no native kernels in this install")
    code = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch, oracles, rlhf_kernels as k
from calls import NAMES, calls
from rlhf_kernels.backends import isa
assert isa() == {isa!r}
for dtype in oracles.DTYPES:
    for rows, length in ((3, 5), (4, 70)):
        for name in NAMES:
            call = calls(rows, length, dtype)[name]
            with k.use_backend("reference"):
                want = call.run()
            masks = {{n: x.to(dtype) for n, x in call.tensors.items() if x.dtype == torch.bool}}
            with k.use_backend("cpu"):
                got = call.run(**masks)
            rough = {{torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.int64: 0}}
            for a, b in zip(got, want, strict=True):
                loose = rough[dtype if "linear" in name else a.dtype]
                torch.testing.assert_close(a, b, rtol=rough[a.dtype], atol=loose)
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"RLHF_KERNELS_ISA": isa}, capture_output=True, text=True
    )
    if "which this build has and this processor runs" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.stdout.strip() == "fine", done.stderr
