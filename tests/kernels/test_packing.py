import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlhf_kernels
from rlhf_kernels import pack_sequences, packing

native = pytest.mark.skipif(packing._pack is None, reason="_C was not built")


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 30))
    return draw(st.lists(st.integers(1, capacity), max_size=40)), capacity


@given(problems())
def test_every_sequence_is_in_one_bin_that_holds_it(problem):
    lengths, capacity = problem
    bins = pack_sequences(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b and sum(lengths[i] for i in b) <= capacity for b in bins)


@given(problems())
def test_best_fit_decreasing_by_hand(problem):
    """The definition, step by step over all bins."""
    lengths, capacity = problem
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [capacity - sum(lengths[j] for j in b) for b in bins]
        fits = [b for b in range(len(bins)) if room[b] >= lengths[i]]
        if fits:
            bins[min(fits, key=lambda b: (room[b], b))].append(i)
        else:
            bins.append([i])
    assert packing.pack_in_python(lengths, capacity) == bins
    assert pack_sequences(lengths, capacity) == bins


@given(st.lists(st.integers(1, 9), max_size=7))
def test_close_to_the_least_possible(lengths):
    def least(rest, rooms):
        if not rest:
            return len(rooms)
        options = [least(rest[1:], (*rooms, 10 - rest[0]))]
        for i, room in enumerate(rooms):
            if room >= rest[0] and room not in rooms[:i]:
                options.append(least(rest[1:], (*rooms[:i], room - rest[0], *rooms[i + 1 :])))
        return min(options)

    assert len(pack_sequences(lengths, 10)) <= 11 / 9 * least(tuple(lengths), ()) + 6 / 9


@native
def test_cpp_equals_python_at_scale():
    generator = random.Random(0)
    lengths = [generator.randint(1, 4096) for _ in range(20_000)]
    assert packing._pack(lengths, 4096) == packing.pack_in_python(lengths, 4096)


@native
def test_the_module_itself_refuses_bad_lengths():
    with pytest.raises(ValueError, match="11 at index 1"):
        packing._pack([3, 11], 10)


@native
def test_build_info_names_the_build():
    from rlhf_kernels import _C

    info = _C.build_info()
    assert info["build"] == "Release"
    assert info["standard"] == "C++17"
    assert info["version"] == rlhf_kernels.__version__
    assert info["compiler"]


def test_without_the_module_python_packs(monkeypatch):
    monkeypatch.setattr(packing, "_pack", None)
    assert pack_sequences([3, 7, 5, 2], 10) == [[1, 0], [2, 3]]


def test_tensors_arrays_and_nothing():
    expected = [[1, 0], [2, 3]]
    assert pack_sequences(torch.tensor([3, 7, 5, 2]), 10) == expected
    assert pack_sequences((x for x in (3, 7, 5, 2)), 10) == expected
    assert pack_sequences([], 10) == []


@pytest.mark.parametrize(
    ("lengths", "capacity", "error", "message"),
    [
        ([3, 11], 10, ValueError, r"lengths: is 11 at index 1, must be in \[1, 10\]"),
        ([0], 10, ValueError, r"lengths: is 0 at index 0, must be in \[1, 10\]"),
        ([2, -1], 10, ValueError, "lengths: is -1 at index 1, must be"),
        ([2**64], 10, ValueError, f"lengths: is {2**64} at index 0, must be"),
        ([1.5], 10, TypeError, "lengths: is 1.5 at index 0, must be an integer"),
        ([1, True], 10, TypeError, "lengths: is True at index 1, must be an integer"),
        ("ab", 10, TypeError, "lengths: is 'a' at index 0, must be an integer"),
        (torch.ones(2, 2).long(), 10, TypeError, r"lengths: is \[1, 1\] at index 0, must be an integer"),
        (7, 10, TypeError, "lengths: is 7, must be an iterable of integers"),
        (torch.tensor(7), 10, TypeError, "lengths: is 7, must be an iterable of integers"),
        ([1], 2.0, TypeError, "capacity: is 2.0, must be an integer"),
        ([1], True, TypeError, "capacity: is True, must be an integer"),
        ([], 0, ValueError, r"capacity: is 0, must be in \[1, "),
        ([1], 2**64, ValueError, f"capacity: is {2**64}, must be in"),
    ],
)
def test_errors_name_the_argument(lengths, capacity, error, message):
    with pytest.raises(error, match=message):
        pack_sequences(lengths, capacity)
