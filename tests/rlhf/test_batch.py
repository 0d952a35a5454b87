"""Packing: every token is laid out once, flat indices are right, and log-probs are the same as without packing."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.batch import Group, groups_of_one, lay_out, split
from rlhf.models import LanguageModel

VOCAB = 32
TOKENS = st.integers(1, VOCAB - 1)  # 0 is what unused positions hold
PAIRS = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=7), st.lists(TOKENS, min_size=1, max_size=6)),
    min_size=1,
    max_size=8,
)
# Rows of 10: the lengths 10, 4+6, 3+7 and 2+3+4 share rows two and three at a time.
SHAPES = [(6, 4), (1, 3), (4, 2), (2, 1), (3, 4), (1, 1), (1, 2), (3, 1)]


def unzip(pairs):
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def groups_of(lengths):
    """Groups whose sequences have these lengths."""
    return [Group([1], [[2] * (length - 1) for length in group]) for group in lengths]


def segments(batch):
    """(start, tokens) of everything in the rows that begins at position 0, without the unused ends of rows."""
    found = []
    columns = batch.input_ids.shape[1]
    for row, (ids, positions) in enumerate(zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True)):
        assert positions[0] == 0
        for column, (token, position) in enumerate(zip(ids, positions, strict=True)):
            if position == 0:
                found.append((row * columns + column, []))
            assert position == len(found[-1][1])
            found[-1][1].append(token)
        while found[-1][1][-1] == 0:
            found[-1][1].pop()
    return found


@given(PAIRS, st.booleans())
def test_every_sequence_is_laid_out_once_and_positions_restart(pairs, one_row):
    batch = lay_out(groups_of_one(*unzip(pairs)), "one_row" if one_row else "packed")
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    assert batch.input_ids.shape == batch.position_ids.shape
    assert sorted(tokens for _, tokens in segments(batch)) == sorted(prompt + response for prompt, response in pairs)
    assert int((batch.input_ids != 0).sum()) == sum(len(prompt) + len(response) for prompt, response in pairs)


@given(PAIRS)
def test_row_length(pairs):
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    assert lay_out(groups_of_one(*unzip(pairs))).input_ids.shape[1] == max(lengths)
    assert lay_out(groups_of_one(*unzip(pairs)), "one_row").input_ids.shape == (1, sum(lengths))


@given(PAIRS, st.booleans())
def test_flat_indices_agree_with_a_recomputation(pairs, one_row):
    batch = lay_out(groups_of_one(*unzip(pairs)), "one_row" if one_row else "packed")
    # `last` is checked against where the segments end, which is found without it.
    ends = {start + len(tokens) - 1: tokens for start, tokens in segments(batch)}
    last = batch.last.tolist()
    assert sorted(last) == sorted(ends)
    assert [ends[end] for end in last] == [prompt + response for prompt, response in pairs]

    before, targets = [], []
    for end, (_, response) in zip(last, pairs, strict=True):
        for offset, token in enumerate(response):
            before.append(end - len(response) + offset)
            targets.append(token)
    assert batch.before.tolist() == before
    assert batch.targets.tolist() == targets
    assert batch.lengths.tolist() == [len(response) for _, response in pairs]
    for name in ("before", "targets", "last", "lengths"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert torch.equal(batch.input_ids.flatten()[batch.before + 1], batch.targets)


@given(PAIRS)
def test_a_response_may_be_empty(pairs):
    prompts, responses = unzip(pairs)
    responses[0] = []
    batch = lay_out(groups_of_one(prompts, responses))
    assert batch.lengths[0] == 0
    assert len(batch.before) == len(batch.targets) == sum(map(len, responses))
    assert batch.input_ids.flatten()[batch.last[0]] == prompts[0][-1]


def test_all_responses_may_be_empty():
    """This happens when a model without a cache samples its next token."""
    batch = lay_out(groups_of_one([[1, 2], [3]], [[], []]))
    assert batch.before.dtype == batch.targets.dtype == torch.int64
    assert batch.before.tolist() == batch.targets.tolist() == []
    assert batch.input_ids.flatten()[batch.last].tolist() == [2, 3]


def test_prompts_and_responses_must_pair_up():
    with pytest.raises(ValueError, match="zip"):
        groups_of_one([[1], [2]], [[3]])
    with pytest.raises(ValueError, match="zip"):
        groups_of_one([[1]], [[2], [3]])


def test_padded_rows():
    """One row for each sequence, in order, with a mask and no positions, even if two sequences would fit one row."""
    batch = lay_out(groups_of_one([[1, 2], [3], [4]], [[5, 6], [7], [8, 9]]), "padded")
    assert batch.input_ids.tolist() == [[1, 2, 5, 6], [3, 7, 0, 0], [4, 8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.attention_mask.dtype == torch.int64
    assert batch.position_ids is None
    assert batch.before.tolist() == [1, 2, 4, 8, 9]
    assert batch.targets.tolist() == [5, 6, 7, 8, 9]
    assert batch.last.tolist() == [3, 5, 10]
    assert batch.lengths.tolist() == [2, 1, 2]


def test_shared_prompts():
    """A prompt, then its responses, whose positions go on from its end; the mask lets none of them see another."""
    groups = [Group([1, 2], [[5, 6], [], [7]]), Group([3], [[8]]), Group([4, 4, 4], [[9, 9]])]
    batch = lay_out(groups, "shared")
    assert batch.input_ids.tolist() == [[1, 2, 5, 6, 7], [4, 4, 4, 9, 9], [3, 8, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert batch.before.tolist() == [1, 2, 1, 10, 7, 8]
    assert batch.targets.tolist() == [5, 6, 7, 8, 9, 9]
    assert batch.last.tolist() == [3, 1, 4, 11, 9]
    assert batch.lengths.tolist() == [2, 0, 1, 1, 2]
    assert batch.attention_mask.shape == (3, 1, 5, 5)
    seen = [[[at for at, sees in enumerate(row) if sees] for row in rows[0]] for rows in batch.attention_mask.tolist()]
    assert seen == [
        [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]],
        [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]],
        [[0], [0, 1], [2], [2, 3], [2, 3, 4]],
    ]


def test_only_padded_rows_are_masked():
    for layout in ("packed", "one_row"):
        assert lay_out(groups_of_one([[1, 2], [3]], [[4], [5]]), layout).attention_mask is None


def test_to_moves_every_tensor():
    for layout in ("packed", "padded"):
        batch = lay_out(groups_of_one([[1, 2]], [[3]]), layout)
        moved = batch.to(torch.device("meta"))
        for name, tensor in vars(batch).items():
            there = getattr(moved, name)
            assert there is None if tensor is None else (there.device.type, there.shape) == ("meta", tensor.shape)


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    # A wide initialisation: with the usual 0.02 attention hardly matters, and a leak between sequences could hide.
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return LanguageModel(GPT2LMHeadModel(config).eval())


def log_probs(hidden, weight, targets, *, bias, softcap, temperature):
    """Stands for an op of ``rlhf_kernels``, in plain torch."""
    assert bias is None
    assert softcap is None
    return torch.log_softmax(hidden @ weight.T / temperature, -1).gather(-1, targets[:, None])[:, 0]


@torch.no_grad()
def alone(model, prompt, response):
    """The log-probs of a response from the Hugging Face model itself, one unpacked sequence at a time."""
    logits = model.model(torch.tensor([prompt + response])).logits[0]
    rows = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return rows[torch.arange(len(response)), torch.tensor(response)]


@torch.no_grad()
def check_same_as_alone(model, pairs, one_row):
    batch = lay_out(groups_of_one(*unzip(pairs)), "one_row" if one_row else "packed")
    packed = model(batch, log_probs)
    expected = torch.cat([alone(model, prompt, response) for prompt, response in pairs])
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    return batch


@pytest.mark.parametrize("one_row", [False, True])
def test_model_sees_each_sequence_alone(gpt2, one_row):
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(1, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    pairs = [(draw(prompt), draw(response)) for prompt, response in SHAPES]
    batch = check_same_as_alone(gpt2, pairs, one_row)
    rows = batch.input_ids.shape[0]
    assert rows == 1 if one_row else 1 < rows < len(pairs)  # several sequences per row, or this tests nothing


@settings(max_examples=25, deadline=None)
@given(pairs=PAIRS, one_row=st.booleans())
def test_model_sees_any_sequence_alone(gpt2, pairs, one_row):
    check_same_as_alone(gpt2, pairs, one_row)


GROUPS = st.lists(
    st.tuples(
        st.lists(TOKENS, min_size=1, max_size=7),
        st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
)


@torch.no_grad()
def test_rows_of_shared_prompts_may_be_longer_than_the_context(gpt2):
    long, short = Group([1, 2, 3], [[4] * 60, [5] * 61, [6] * 7]), Group([7], [[8, 9]])
    found = gpt2(lay_out([long, short], "shared"), log_probs)
    pairs = [(group.prompt, response) for group in (long, short) for response in group.responses]
    expected = torch.cat([alone(gpt2, prompt, response) for prompt, response in pairs])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_one_sequence_each_need_no_mask(gpt2, monkeypatch):
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    check_same_as_alone(gpt2, [([1, 2], [3, 4, 5]), ([6, 7, 8], [9])], False)
    assert masks == [None] * len(masks)
    assert len(masks) > 0


@settings(max_examples=25, deadline=None)
@given(GROUPS)
def test_model_sees_each_response_of_a_shared_prompt_alone(gpt2, groups):
    assert gpt2.shares_prompts
    pairs = [(prompt, response) for prompt, responses in groups for response in responses]
    groups = [Group(*group) for group in groups]
    shared = gpt2(lay_out(groups, "shared"), log_probs)
    expected = torch.cat([alone(gpt2, prompt, response) for prompt, response in pairs])
    torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-5)
    weights = torch.arange(1.0, len(shared) + 1).sin()
    gradients = []
    for layout in ("shared", "padded"):
        loss = (gpt2(lay_out(groups, layout), log_probs) * weights).sum()
        gradients.append(torch.autograd.grad(loss, list(gpt2.model.transformer.parameters()), allow_unused=True))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_comparison_notices_a_leak(gpt2):
    """Without restarting positions the same row gives other log-probs, so the tests above can fail."""
    pairs = [([3, 4, 5], [6, 7]), ([8, 9], [10, 11])]
    batch = lay_out(groups_of_one(*unzip(pairs)), "one_row")
    good = gpt2(batch, log_probs)
    batch.position_ids.copy_(torch.arange(batch.position_ids.numel())[None])
    assert not torch.allclose(gpt2(batch, log_probs), good, atol=1e-2)


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 40))
def test_split(lengths, tokens):
    parts = list(split(groups_of([[length] for length in lengths]), tokens))
    assert [index for part in parts for index in part] == list(range(len(lengths)))
    assert all(parts)
    for part in parts:
        assert len(part) == 1 or sum(lengths[index] for index in part) <= tokens
    for part, following in pairwise(parts):
        # No part ends while the next group would still fit.
        assert sum(lengths[index] for index in part) + lengths[following[0]] > tokens


@pytest.mark.parametrize(
    ("lengths", "tokens", "parts"),
    [
        ([], 5, []),
        ([5], 5, [[0]]),
        ([9], 5, [[0]]),
        ([2, 3, 1], 5, [[0, 1], [2]]),
        ([1, 9, 1, 4], 5, [[0], [1], [2, 3]]),
    ],
)
def test_split_examples(lengths, tokens, parts):
    assert list(split(groups_of([[length] for length in lengths]), tokens)) == parts


@pytest.mark.parametrize(
    ("groups", "tokens", "parts"),
    [
        ([[3], [3], [3]], 9, [[0, 1, 2]]),
        ([[3], [3], [3]], 8, [[0, 1], [2]]),
        ([[1], [5], [1]], 10, [[0, 1], [2]]),  # two rows of 5, and no room for a third
        ([[5], [1], [1], [1]], 15, [[0, 1, 2], [3]]),
        ([[1], [1], [6], [1], [1]], 6, [[0, 1], [2], [3, 4]]),
        ([[2, 4], [1, 1]], 16, [[0, 1]]),
        ([[2, 4], [1, 1]], 15, [[0], [1]]),
        ([[1, 1], [1, 4]], 16, [[0, 1]]),
        ([[1, 1], [1, 4]], 15, [[0], [1]]),
        ([[9, 9], [1]], 4, [[0], [1]]),
    ],
)
def test_padded_parts_are_as_many_rows_times_the_longest(groups, tokens, parts):
    assert list(split(groups_of(groups), tokens, "padded")) == parts


def test_a_shared_prompt_counts_once():
    groups = [Group([1] * 5, [[2], [3, 3]]), Group([1] * 4, [[2, 2]] * 2), Group([1], [[1]])]
    assert list(split(groups, 16, "shared")) == [[0, 1], [2]]
    assert list(split(groups, 18, "shared")) == [[0, 1, 2]]
    assert list(split(groups, 18)) == [[0], [1, 2]]


def test_a_group_counts_all_its_sequences():
    assert list(split(groups_of([[2, 3], [1, 4], [1]]), 10)) == [[0, 1], [2]]
    assert list(split(groups_of([[2, 3], [1, 4], [1]]), 11)) == [[0, 1, 2]]
    assert list(split(groups_of([[2, 3], [1, 4], [1]]), 9)) == [[0], [1, 2]]
