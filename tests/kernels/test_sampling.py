import math

import oracles
import pytest
import torch
from calls import fewer
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kernels import sample_tokens, selective_log_softmax
from rlhf_kernels.reference import sampling as reference

ALL_ONES = -1  # as an int64
LARGE = 2**63 - 1

# Of Philox-4x32-10, published with its source code (Random123, kat_vectors): counter, key, result.
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]  # fmt: skip


def signed(low, high):
    """Two words as an int64."""
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox(backend, counter, key, words):
    assert oracles.philox(key, counter) == words
    seed, stream, step = signed(*key), signed(*counter[:2]), signed(*counter[2:])
    assert [int(x) for x in reference.philox(seed, [torch.tensor(c) for c in counter])] == words
    # Of equally likely tokens, the one whose number is made of the highest bits of the second word.
    token, _ = sample_tokens(torch.zeros(2**16), seed=seed, stream=stream, step=step)
    assert token.item() == words[1] >> 16


@st.composite
def problems(draw):
    rows, vocabulary = draw(st.integers(0, 4)), draw(st.sampled_from([1, 2, 5, 127, 2049]))
    value = st.one_of(st.floats(-10, 10, width=16), st.sampled_from([1e4, -1e4, 0.0, -math.inf]))
    values = (draw(st.lists(value, min_size=9, max_size=9)) * (rows * vocabulary))[: rows * vocabulary]
    logits = torch.tensor(values, dtype=torch.float64).reshape(rows, 1, vocabulary).repeat(1, 2, 1)
    logits = torch.where(torch.isinf(logits).all(-1, keepdim=True), 0.0, logits)
    numbers = st.one_of(st.integers(-(2**63), LARGE), st.integers(0, 3))
    counters = draw(st.lists(numbers, min_size=4 * rows, max_size=4 * rows))
    stream, step = torch.tensor(counters, dtype=torch.int64).reshape(2, rows, 2)
    return (
        draw(oracles.layouts(logits.to(draw(st.sampled_from([*oracles.DTYPES, torch.float64]))))),
        draw(numbers),
        stream,
        step,
        draw(st.sampled_from([1.0, 0.5, 0.7, 2.0, 0.0])),
    )


@given(problems())
def test_tokens_match_float64_loops(backend, problem):
    logits, seed, stream, step, temperature = problem
    if logits.dtype == torch.float64 and backend != "reference":
        logits = logits.float()
    tokens, logprobs = sample_tokens(logits, seed=seed, stream=stream, step=step, temperature=temperature)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert torch.equal(logprobs, selective_log_softmax(logits, tokens, temperature=temperature or 1.0))
    for at in torch.cartesian_prod(torch.arange(len(tokens)), torch.arange(2)).tolist():
        row, token = logits[tuple(at)].tolist(), int(tokens[tuple(at)])
        if temperature == 0:
            assert token == row.index(max(row))
            continue
        random = oracles.uniform(seed, int(stream[tuple(at)]), int(step[tuple(at)]))
        probabilities = [math.exp(x) for x in oracles.log_softmax(row, temperature)]
        before = math.fsum(probabilities[:token])
        assert probabilities[token] > 0
        assert before - 1e-6 <= random < before + probabilities[token] + 1e-6


def distribution(vocabulary):
    """Logits of which some are banned, the first and the last among them."""
    logits = torch.randn(vocabulary) * 2
    logits[:: max(2, vocabulary // 50)] = -torch.inf
    logits[-1] = -torch.inf
    return logits


@pytest.mark.long_for(vocabulary=[50_257])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("vocabulary", [7, 1000, 50_257])
def test_a_million_draws_have_the_distribution(backend, vocabulary, temperature):
    if backend in ("triton", "cuda") and not torch.cuda.is_available():
        pytest.skip("a million draws would take an hour; the test below compares it with the reference")
    if backend == "reference" and vocabulary > 7:
        pytest.skip("takes minutes")
    logits, count = distribution(vocabulary), 1_000_000
    drawn = torch.zeros(vocabulary)
    for some in torch.arange(count).chunk(100):
        tokens, _ = sample_tokens(logits.expand(len(some), -1), seed=5, stream=some, step=9, temperature=temperature)
        drawn += torch.bincount(tokens, minlength=vocabulary)
    expected = (logits.double() / temperature).softmax(-1) * count
    assert drawn[expected == 0].sum() == 0
    assert oracles.chi_square(drawn.tolist(), expected.tolist()) < 4  # standard deviations


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(100, 1000), (8, 50_257)])
def test_kernels_draw_the_tokens_of_the_reference(kernels, rows, vocabulary, temperature):
    """But where the number is within rounding of a boundary, which none of these are."""
    rows = fewer(kernels, rows)
    logits = torch.stack([distribution(vocabulary) for _ in range(rows)])
    stream, step = torch.arange(rows), torch.arange(rows) * 1000
    tokens, _ = sample_tokens(logits, seed=1, stream=stream, step=step, temperature=temperature)
    want, _ = reference.sample_tokens(logits, stream, step, 1, temperature)
    assert (tokens != want).sum() == 0


def counter_of(words):
    """The stream and step for which Philox with key 0 gives these words: it is a bijection, undone round by round."""
    mask, keys = 0xFFFFFFFF, [(0x9E3779B9 * i & 0xFFFFFFFF, 0xBB67AE85 * i & 0xFFFFFFFF) for i in range(10)]
    c = list(words)
    for key_0, key_1 in reversed(keys):
        first, third = c[3] * pow(0xD2511F53, -1, 2**32) & mask, c[1] * pow(0xCD9E8D57, -1, 2**32) & mask
        second = (third * 0xCD9E8D57 >> 32) ^ c[0] ^ key_0
        fourth = (first * 0xD2511F53 >> 32) ^ c[2] ^ key_1
        c = [first, second, third, fourth]
    assert oracles.philox([0, 0], c) == list(words)
    return {"stream": signed(*c[:2]), "step": signed(*c[2:])}


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 1025, 20_000])
def test_extremes_of_the_generator(backend, vocabulary):
    """No token is banned so that one of them would draw it, and none is likelier for being first or last."""
    lowest, highest = counter_of([0] * 4), counter_of([0xFFFFFFFF] * 4)
    flat = torch.zeros(vocabulary)
    banned = flat.clone()
    if vocabulary > 4:
        banned[[0, 1, -1]] = -torch.inf
    unlikely = banned.clone()
    unlikely[[0, -1]] -= 60  # e⁻⁶⁰ is far below the lowest number
    for logits, first, last in (
        (flat, 0, vocabulary - 1),
        (banned, 2, vocabulary - 2) if vocabulary > 4 else (flat, 0, vocabulary - 1),
        (unlikely, *((2, vocabulary - 2) if vocabulary > 4 else (0, vocabulary - 1))),
    ):
        assert sample_tokens(logits, seed=0, **lowest)[0].item() == first
        assert sample_tokens(logits, seed=0, **highest)[0].item() == last


def test_a_row_is_the_same_alone_and_in_any_order(kernels):
    logits, stream, step = torch.randn(40, 5003) * 3, torch.arange(40), torch.arange(40) % 7
    tokens, logprobs = sample_tokens(logits, seed=11, stream=stream, step=step)
    order = torch.randperm(40)
    again = sample_tokens(logits[order], seed=11, stream=stream[order], step=step[order].int())
    assert torch.equal(again[0], tokens[order])
    assert torch.equal(again[1], logprobs[order])
    for row in (0, 17, 39):
        alone = sample_tokens(logits[row], seed=11, stream=row, step=row % 7)
        assert alone[0] == tokens[row]
        assert alone[1] == logprobs[row]


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 35])
def test_logits_in_columns(kernels, rows, dtype):
    """As a matmul with the weights on the left leaves them."""
    rows = fewer(kernels, rows)
    logits = (torch.randn(rows, 1037) * 3).to(dtype)
    call = {"seed": 2, "stream": torch.arange(rows), "step": 1}
    want = sample_tokens(logits, **call)
    wide = torch.zeros(1037, rows + 3, dtype=dtype)
    wide[:, 1 : rows + 1] = logits.T
    for columns in (logits.T.contiguous().T, wide[:, 1 : rows + 1].T):
        got = sample_tokens(columns, **call)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_seed_stream_and_step_all_matter(backend):
    """Each of them with all of its bits, and none in place of another."""
    numbers = (0, 1, 2**32)
    seen = {
        sample_tokens(torch.zeros(2**14), seed=seed, stream=stream, step=step)[0].item()
        for seed in numbers
        for stream in numbers
        for step in numbers
    }
    assert len(seen) == 27


def test_temperature_0_takes_the_first_of_the_largest(backend):
    logits = torch.zeros(3, 40_000)
    logits[0, [7, 8, 39_999]] = 5
    logits[1, [20_001, 20_003]] = 5
    logits[2] = -torch.inf
    logits[2, 39_998:] = -3
    tokens, logprobs = sample_tokens(logits, seed=0, stream=0, step=0, temperature=0.0)
    assert tokens.tolist() == [7, 20_001, 39_998]
    assert torch.equal(logprobs, selective_log_softmax(logits, tokens))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution(backend, value, temperature):
    logits = torch.randn(2, 3, 20_000)
    logits[1, 0, 19_000] = value
    call = {"seed": 0, "stream": 0, "step": 0, "temperature": temperature}
    if torch.get_default_device().type == "cuda":
        tokens, logprobs = sample_tokens(logits, **call)
        assert ((tokens == -1) == logprobs.isnan()).all()
        assert (tokens == -1).nonzero().tolist() == [[1, 0]]
        return
    with pytest.raises(ValueError, match=r"logits: row \(1, 0\) holds NaN or inf, or nothing above -inf"):
        sample_tokens(logits, **call)
    with pytest.raises(ValueError, match=r"logits: row \(\) holds NaN"):
        sample_tokens(torch.full((20_000,), -torch.inf), **call)


def test_no_rows(backend):
    none = torch.zeros(0, dtype=torch.long)
    tokens, logprobs = sample_tokens(torch.zeros(0, 7), seed=0, stream=none, step=3)
    assert tokens.shape == logprobs.shape == (0,)


def test_no_gradient(backend):
    _, logprobs = sample_tokens(torch.randn(3, 5, requires_grad=True), seed=0, stream=0, step=0)
    assert not logprobs.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: has shape \(2, 0\), must be .* V at least 1"),
        ({"logits": torch.zeros(2, 5).int()}, TypeError, "logits: has dtype torch.int32, must be one of"),
        ({"seed": 2**63}, ValueError, r"seed: is 9223372036854775808, must be in \[-2\*\*63, 2\*\*63\)"),
        ({"seed": 1.0}, TypeError, "seed: is 1.0 of type float, must be an int"),
        ({"stream": -(2**63) - 1}, ValueError, "stream: is -9223372036854775809, must be in"),
        ({"stream": torch.zeros(3, dtype=torch.long)}, ValueError, r"stream: has shape \(3,\), must be \(2,\)"),
        ({"step": torch.zeros(2)}, TypeError, "step: has dtype torch.float32, must be one of torch.int64"),
        ({"step": None}, TypeError, "step: is None of type NoneType, must be an int"),
        ({"step": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "step: is on meta, must be on c"),
        ({"temperature": -1.0}, ValueError, r"temperature: is -1.0, must be finite and in \[0.0, inf\)"),
    ],
)
def test_errors_name_the_argument(backend, arguments, error, message):
    call = {"logits": torch.zeros(2, 5), "seed": 0, "stream": 0, "step": 0} | oracles.here(arguments, message)
    with pytest.raises(error, match=message):
        sample_tokens(call.pop("logits"), **call)
