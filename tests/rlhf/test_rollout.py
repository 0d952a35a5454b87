"""Sampling: the log-probs that are kept are the model's own, and tokens are drawn as often as the model says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tools import tiny_gpt2

from rlhf import rollout
from rlhf.batch import groups_of_one
from rlhf.decoding import decoding_layers, linear
from rlhf.models import LanguageModel
from rlhf.rollout import NotFiniteError, sample, sampling_batches
from rlhf_kernels import linear_selective_log_softmax

EOS = 1
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12] * 9, [13, 14, 15], [16, 17], [18]]


def draw(model, prompts, seed=0, **options):
    return sample(model, prompts, **{"end_token_ids": {EOS}, "max_new_tokens": 10, "seed": seed} | options)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("batch_size", [512, 3, 1])
def test_logprobs_are_teacher_forced_ones(lm, temperature, batch_size):
    """They are compared with one pass over the whole sequence alone, without a cache, by transformers' own logits."""
    completions = draw(lm, PROMPTS, temperature=temperature, batch_size=batch_size)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            logprobs = (lm.model(ids).logits[0].float() / temperature).log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(completion.logprobs, expected, atol=1e-5, rtol=1e-5)


def test_logprobs_are_the_trainer_s(lm):
    """They are compared with packed log-probs from hidden states, as in the ratio of the first minibatch."""
    completions = draw(lm, PROMPTS)
    batch = lm.lay_out(groups_of_one(PROMPTS, [completion.tokens for completion in completions]))
    expected = lm(batch, linear_selective_log_softmax)
    torch.testing.assert_close(torch.cat([c.logprobs for c in completions]), expected.detach(), atol=1e-5, rtol=1e-5)


def test_ends_at_eos_or_at_the_limit(lm):
    completions = draw(lm, PROMPTS * 20)
    ended = [completion.tokens[-1] == EOS for completion in completions]
    assert any(ended)
    assert not all(ended)
    for completion, end in zip(completions, ended, strict=True):
        assert EOS not in completion.tokens[:-1]
        assert len(completion.tokens) == len(completion.logprobs)
        assert len(completion.tokens) <= 10
        assert end or len(completion.tokens) == 10


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (48, 5), (49, 5), (6, 8, 5), (0, 5)])
def test_linear_of_few_and_of_many_rows(shape, has_bias, mixed):
    states, weight, bias = torch.randn(shape), torch.randn(3, 5), torch.randn(3) if has_bias else None
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        got, want = linear(states, weight, bias), torch.nn.functional.linear(states, weight, bias)
    torch.testing.assert_close(got, want, **({"rtol": 0.02, "atol": 0.02} if mixed else {}))


def test_linear_layers_of_a_model_are_as_before_when_sampling_is_over():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, bias=False))
    states = torch.randn(2, 4, 5)
    want = layers(states)
    with decoding_layers(layers):
        got = layers(states)
        assert [set(vars(layer)) & {"forward"} for layer in layers] == [{"forward"}] * 2
    torch.testing.assert_close(got, want)
    assert got.is_contiguous()
    assert [set(vars(layer)) & {"forward"} for layer in layers] == [set()] * 2


def test_a_layer_whose_forward_is_replaced_keeps_that():
    layer = torch.nn.Linear(5, 7)
    layer.forward = lambda states: states + 1
    with decoding_layers(layer):
        assert torch.equal(layer(torch.zeros(2, 5)), torch.ones(2, 5))
    assert torch.equal(layer(torch.zeros(2, 5)), torch.ones(2, 5))


def test_one_token(lm):
    completions = draw(lm, PROMPTS, max_new_tokens=1)
    assert [len(completion.tokens) for completion in completions] == [1] * len(PROMPTS)


def test_nothing_to_sample(lm):
    assert draw(lm, []) == []


@pytest.mark.parametrize("batch_size", [512, 2])
def test_greedy_is_transformers_generate(lm, tokenizer, batch_size):
    ours = draw(lm, PROMPTS, temperature=0, batch_size=batch_size)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        options = {
            "do_sample": False,
            "max_new_tokens": 10,
            "eos_token_id": EOS,
            "pad_token_id": tokenizer.pad_token_id,
        }
        theirs = lm.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert completion.tokens == theirs


def test_greedy_logprobs_are_those_at_temperature_one(lm):
    for prompt, completion in zip(PROMPTS, draw(lm, PROMPTS, temperature=0), strict=True):
        with torch.no_grad():
            expected = lm.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).max()
        torch.testing.assert_close(completion.logprobs[0], expected, atol=1e-5, rtol=1e-5)


def test_order_is_kept(lm):
    """Prompts are sorted by length for sampling. Greedy answers show to which prompt each belongs."""
    alone = [draw(lm, [prompt], temperature=0)[0].tokens for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in alone}) > 3
    for batch_size in (512, 3):
        assert [c.tokens for c in draw(lm, PROMPTS, temperature=0, batch_size=batch_size)] == alone
    assert [c.tokens for c in draw(lm, PROMPTS[::-1], temperature=0)] == alone[::-1]


def test_seed(lm):
    first, again, other = (draw(lm, PROMPTS, seed=seed) for seed in (1, 1, 2))
    assert [c.tokens for c in first] == [c.tokens for c in again]
    assert [c.tokens for c in first] != [c.tokens for c in other]
    assert len({tuple(c.tokens) for c in draw(lm, [PROMPTS[0]] * 8)}) > 4  # rows draw apart


def test_a_completion_is_the_same_in_any_batch(lm):
    """Only its number and the seed choose its tokens: not the batch, the order, or torch's generators."""
    prompts, whole = PROMPTS * 9, draw(lm, PROMPTS * 9)
    torch.manual_seed(99)
    for batch_size in (1, 7, 512):
        found = draw(lm, prompts, batch_size=batch_size)
        assert [c.tokens for c in found] == [c.tokens for c in whole]
    order = [40, 3, 62, 17, 0, 41]
    some = draw(lm, [prompts[i] for i in order], streams=order)
    assert [c.tokens for c in some] == [whole[i].tokens for i in order]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies(temperature):
    """The first and the second token drawn, against the model's distribution over four tokens, one of them EOS."""
    torch.manual_seed(3)
    model = LanguageModel(tiny_gpt2(4, EOS, n_embd=16, n_positions=8, initializer_range=0.4)).eval()
    count = 20_000
    completions = draw(model, [[0, 2]] * count, temperature=temperature, max_new_tokens=2, batch_size=5000)
    with torch.no_grad():
        first = (model.model(torch.tensor([[0, 2]])).logits[0, -1] / temperature).softmax(-1)
        second = (model.model(torch.tensor([[0, 2, 3]])).logits[0, -1] / temperature).softmax(-1)
    assert first.max() - first.min() > 0.1
    tokens = torch.tensor([completion.tokens[0] for completion in completions])
    tolerance = 4 * (first * (1 - first) / count).sqrt()
    assert ((tokens.bincount(minlength=4) / count - first).abs() < tolerance).all()
    after = torch.tensor([completion.tokens[1] for completion in completions if completion.tokens[0] == 3])
    tolerance = 4 * (second * (1 - second) / len(after)).sqrt()
    assert ((after.bincount(minlength=4) / len(after) - second).abs() < tolerance).all()


def test_training_mode_is_kept_and_dropout_off(base):
    model = LanguageModel.load(base, residual_dropout=0.5)
    expected = [c.tokens for c in draw(model.eval(), PROMPTS)]
    assert not model.model.training
    assert [c.tokens for c in draw(model.train(), PROMPTS)] == expected
    assert model.model.training


def test_needs_no_gradient(lm):
    assert not any(completion.logprobs.requires_grad for completion in draw(lm, PROMPTS))
    assert all(parameter.grad is None for parameter in lm.parameters())


def test_tensors_are_made_on_the_model_s_device(lm):
    """As on a GPU, the model is not on the default device. Here that is the meta device, whose tensors hold nothing."""
    expected = draw(lm, PROMPTS, batch_size=3)
    with torch.device("meta"):
        found = draw(lm, PROMPTS, batch_size=3)
    for here, there in zip(found, expected, strict=True):
        assert here.tokens == there.tokens
        assert torch.equal(here.logprobs, there.logprobs)


@pytest.mark.parametrize(
    ("decoding", "size", "batches"),
    [
        ("padded", 3, [[1, 6, 2], [5, 4, 0], [3]]),
        ("padded", 7, [[1, 6, 2, 5, 4, 0, 3]]),
        ("aligned", 3, [[1, 6], [2, 5], [4], [0], [3]]),
        ("aligned", 1, [[1], [6], [2], [5], [4], [0], [3]]),
    ],
)
def test_prompts_of_like_length_are_sampled_together(decoding, size, batches):
    assert list(sampling_batches(SimpleNamespace(decoding=decoding), PROMPTS, size)) == batches


def test_a_model_without_numbers_has_no_next_token(base):
    model = LanguageModel.load(base)
    torch.nn.init.constant_(model.model.transformer.ln_f.bias, float("nan"))
    model.train()
    with pytest.raises(NotFiniteError, match=r"^the model's logits are not finite$"):
        draw(model, PROMPTS)
    assert model.training


def test_batches_are_of_the_size_asked_for(lm, monkeypatch):
    """The size of a batch bounds the memory of the cache."""
    sizes, decoder = [], rollout.Decoder

    def keep(model, prompts, decoding):
        sizes.append(len(prompts))
        return decoder(model, prompts, decoding)

    monkeypatch.setattr(rollout, "Decoder", keep)
    draw(lm, PROMPTS, batch_size=3)
    assert sizes == [3, 3, 1]
