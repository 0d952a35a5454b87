"""Attention that needs no mask of whole rows: packed sequences are as if each were alone, in one pass and backwards.

torch's varlen_attn runs on NVIDIA GPUs alone. What is proved here is what it is given: a stand-in with its signature
goes through the sequences one at a time. The weights are large, so that a token too many or too few in sight shows.
"""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from model_types import TYPES, tiny
from tools import metrics, only_line
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.varlen import varlen_attn
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils
from transformers.integrations import flex_attention as theirs

from rlhf import loading, models, ppo, reward, varlen
from rlhf.batch import groups_of_one, lay_out
from rlhf.config import LoRA, RunConfig
from rlhf.lora import add_adapter
from rlhf.models import LanguageModel
from rlhf.paged import sample_paged
from rlhf.plan import measure
from rlhf.rollout import sample
from rlhf.settings import ConfigError
from rlhf_kernels import linear_selective_log_softmax

VOCABULARY, END = 57, 1
# Some are longer than the windows and chunks of tiny models, which are of 8 tokens.
LENGTHS = [(13, 9), (1, 4), (6, 3), (9, 14), (2, 1), (5, 5)]
SIGNATURE = inspect.signature(varlen_attn)


def draw(lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


PROMPTS, RESPONSES = draw(prompt for prompt, _ in LENGTHS), draw(response for _, response in LENGTHS)


def alone(query, key, value, left, scale):
    """Attention of one sequence, (T, H, D), each of whose tokens sees ``left`` before itself; −1: all."""
    places = torch.arange(len(query))
    seen = places <= places[:, None]
    if left >= 0:
        seen &= places >= places[:, None] - left
    parts = [part.transpose(0, 1)[None] for part in (query, key, value)]
    return F.scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@pytest.fixture
def calls(monkeypatch):
    """Puts a stand-in where the kernel would be, and returns the arguments of its calls."""
    noted = []

    def stand_in(*args, **options):
        given = SIGNATURE.bind(*args, **options).arguments
        noted.append(given)
        query, key, value, starts = (given[name] for name in ("query", "key", "value", "cu_seq_q"))
        assert query.dtype == key.dtype == value.dtype
        assert given["enable_gqa"]
        assert starts is given["cu_seq_k"]
        assert starts.dtype == torch.int32
        assert given["max_q"] == given["max_k"] == starts.diff().max()
        left, right = given["window_size"]
        assert right == 0
        places = starts.tolist()
        assert (places[0], places[-1]) == (0, len(query))
        sequences = [slice(*ends) for ends in pairwise(places)]
        return torch.cat([alone(query[at], key[at], value[at], left, given["scale"]) for at in sequences])

    stand_in.__signature__ = SIGNATURE
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(varlen, "DEVICE", "cpu")
    return noted


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model of a type with large weights."""

    def save(model_type):
        tiny(model_type, VOCABULARY, END).save_pretrained(tmp_path / model_type)
        return tmp_path / model_type

    return save


def results(run, model, weights):
    """What a function returns, and the gradients of its weighted sum."""
    model.zero_grad()
    found = run()
    (found * weights).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


def each_alone(model):
    """The log-probs of every response from the model itself, without a row that it shares."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model.model(torch.tensor([prompt + response]), use_cache=False).logits[0].float()
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(logprobs.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def check_same_as_alone(model, reference, layout):
    """Log-probs and gradients, against one sequence at a time through SDPA."""
    batch = lay_out(groups_of_one(PROMPTS, RESPONSES), layout)
    weights = torch.arange(1.0, len(batch.targets) + 1).sin()
    ours, ours_back = results(lambda: model(batch, linear_selective_log_softmax), model, weights)
    expected, expected_back = results(lambda: each_alone(reference), reference, weights)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert ours_back.keys() == expected_back.keys()
    # The bias of the keys has no gradient but rounding, so what is far smaller than the others is nothing.
    nothing = 1e-4 * max(gradient.norm() for gradient in expected_back.values())
    for name, gradient in expected_back.items():
        error = (ours_back[name] - gradient).norm() / gradient.norm().clamp(min=nothing)
        assert error < 1e-3, f"{name}: off by {error:.2g}"
    return batch


WINDOWS = {"gpt2": {-1}, "llama": {-1}, "qwen3": {-1}, "mistral": {7}, "gemma3_text": {7}}


@pytest.mark.parametrize("layout", ["one_row", "packed"])
@pytest.mark.parametrize("model_type", WINDOWS)
def test_varlen_attn_sees_each_sequence_alone(model_type, layout, calls, saved):
    path = saved(model_type)
    model = LanguageModel.load(path, attention="varlen_attn").eval()
    assert model.layout == "one_row"
    calls.clear()
    batch = check_same_as_alone(model, LanguageModel.load(path).eval(), layout)
    layers = model.model.config.num_hidden_layers
    assert len(calls) == layers
    assert {call["window_size"][0] for call in calls} == WINDOWS[model_type]
    assert len({id(call["cu_seq_q"]) for call in calls}) <= 2  # made once for each kind of layer
    if layout == "one_row":
        ends = torch.tensor([sum(lengths) for lengths in LENGTHS]).sort(descending=True).values.cumsum(0)
        places = calls[0]["cu_seq_q"].tolist()
        assert len(batch.input_ids) == 1
        assert places[-1] == ends[-1]


@pytest.mark.long
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_is_right_or_refused(model_type, calls, saved):
    """In the layout that is found for it."""
    path = saved(model_type)
    try:
        model = LanguageModel.load(path, attention="varlen_attn").eval()
    except ConfigError:
        pytest.skip("refused")
    check_same_as_alone(model, LanguageModel.load(path).eval(), model.layout)


def test_boundaries_that_are_not_kept_are_found_out(calls, saved, monkeypatch):
    """A kernel that lets sequences see each other gets rows of one sequence."""
    kept = varlen.varlen_attn

    def leaky(query, key, value, starts, _, *lengths, **options):
        ends = starts[[0, -1]]
        return kept(query, key, value, ends, ends, *[int(ends[-1])] * 2, **options)

    leaky.__signature__ = SIGNATURE
    monkeypatch.setattr(varlen, "varlen_attn", leaky)
    monkeypatch.setattr(models, "_said", set())
    assert LanguageModel.load(saved("llama"), attention="varlen_attn").layout == "padded"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "opt"])
def test_padding_and_caches_are_left_to_sdpa(model_type, calls, saved):
    """Also for a type whose positions don't tell where a sequence begins: it gets padded rows."""
    model = LanguageModel.load(saved(model_type), attention="varlen_attn").eval()
    assert model.layout == ("padded" if model_type == "opt" else "one_row")
    assert model.decoding == "padded"
    assert not model.shares_prompts
    calls.clear()
    check_same_as_alone(model, LanguageModel.load(saved(model_type)).eval(), "padded")
    completions = sample(model, PROMPTS, end_token_ids={END}, max_new_tokens=12)
    assert not calls
    with torch.no_grad():
        batch = model.lay_out(groups_of_one(PROMPTS, [completion.tokens for completion in completions]))
        expected = model(batch, linear_selective_log_softmax)
    torch.testing.assert_close(torch.cat([each.logprobs for each in completions]), expected, atol=1e-4, rtol=1e-4)


def test_pages_are_left_to_sdpa(calls, saved):
    model = LanguageModel.load(saved("llama"), attention="varlen_attn").eval()
    calls.clear()
    options = {"end_token_ids": {END}, "max_new_tokens": 4, "temperature": 1.0, "batch_size": 8, "seed": 0}
    assert len(sample_paged(model, PROMPTS, **options)) == len(PROMPTS)
    assert not calls
    assert model.model.config._attn_implementation == "varlen_attn"


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_run(stage, calls, reward_config, ppo_config, tmp_path):
    """In 16 bits, with blocks that run again in the backward pass."""
    common = {"attention": "varlen_attn", "mixed_precision": "bf16", "gradient_checkpointing": True}
    if stage == "reward":
        reward.train(reward_config(epochs=1, **common))
    else:
        ppo.train(ppo_config(episodes=16, **common))
    assert metrics(tmp_path / stage)
    assert {call["query"].dtype for call in calls} == {torch.bfloat16}


def test_a_plan_counts_it_as_sdpa(saved):
    counted = [
        measure(LanguageModel, saved("llama"), RunConfig(output_dir="-", **settings), trained=True, rows=3, length=16)
        for settings in ({"attention": "varlen_attn", "mixed_precision": "bf16"}, {"mixed_precision": "bf16"})
    ]
    assert counted[0] == counted[1]


def test_an_adapter(calls, saved):
    model = LanguageModel.load(saved("llama"), attention="varlen_attn")
    add_adapter(model, LoRA(rank=4), saved("llama"), merged=True)
    calls.clear()
    model(lay_out(groups_of_one(PROMPTS, RESPONSES), "one_row"), linear_selective_log_softmax).sum().backward()
    assert len(calls) == 2


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gemma2", "does not fit the attention of gemma2 models"),
        ("deepseek_v3", "takes heads of a multiple of 8 up to 256, for queries and .* this model's are of 16 and 8"),
        ("gpt_neo", "does not fit the attention of gpt_neo models"),
        ("falcon", "does not fit the attention of falcon models"),
        ("gpt_oss", "does not fit the attention of gpt_oss models"),
    ],
)
def test_types_that_do_otherwise(model_type, message, calls, saved):
    with pytest.raises(ConfigError, match=f"^attention: varlen_attn {message}; leave it out"):
        LanguageModel.load(saved(model_type), attention="varlen_attn")


def test_heads_of_other_sizes(calls):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, attn_implementation="varlen_attn")
    with pytest.raises(ConfigError, match=r"multiple of 8 .* this model's are of 12 and 12"):
        LanguageModel(LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "has no dropout, and this model's is 0.1"),
        ({"softcap": 50.0}, r"has no way for attention that caps its scores \(softcap\)"),
        ({"s_aux": torch.zeros(2)}, r"has no way for attention that has sinks \(s_aux\)"),
        ({"position_bias": torch.zeros(2)}, r"adds a bias to its scores \(position_bias\)"),
        ({"is_causal": False}, "is only for attention that sees nothing of what follows"),
    ],
)
def test_options_that_it_has_not(options, message, calls):
    states = torch.zeros(1, 2, 4, 8)
    whole = varlen.Boundaries(torch.tensor([0, 4], dtype=torch.int32), 4, None)
    found, _ = varlen.attention(torch.nn.Identity(), states, states, states, whole)
    assert found.shape == (1, 4, 2, 8)
    with pytest.raises(ConfigError, match=message):
        varlen.attention(torch.nn.Identity(), states, states, states, whole, **options)


def test_an_older_torch(calls, monkeypatch, saved):
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal=False: None)
    with pytest.raises(ConfigError, match=r"attention: varlen_attn needs torch 2\.11, and this is "):
        LanguageModel.load(saved("llama"), attention="varlen_attn")


def test_on_a_cpu_and_in_float32(rlhf, base, data, tmp_path):
    settings = ["--model", base, "--data", data.demonstrations, "--device", "cpu", "--attention", "varlen_attn"]
    for precision, message in (
        ("bf16", "attention: varlen_attn runs on an NVIDIA GPU, and this run is on cpu"),
        ("no", "mixed_precision: is 'no', must be bf16 or fp16 where attention is varlen_attn"),
    ):
        status, error = rlhf("sft", *settings, "--mixed_precision", precision, "--output_dir", tmp_path / precision)
        assert status == 2
        assert message in only_line(error)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("flex_attention", "attention: flex_attention has no backward pass on a CPU; leave it out"),
        ("varlen_atn", r"attention: is 'varlen_atn', which .*llama does not have: "),
    ],
)
def test_others_that_are_not_there(attention, message, saved):
    with pytest.raises(ConfigError, match=message):
        LanguageModel.load(saved("llama"), attention=attention)


# flex_attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "one_row"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_flex_attention_sees_each_sequence_alone(model_type, layout, saved, monkeypatch):
    """As its definition computes it: what is compiled for a CPU has no backward pass, and may crash."""
    monkeypatch.setattr(loading, "WITHOUT_FLEX", ())
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(theirs, "WrappedFlexAttention", lambda _: lambda: flex.flex_attention)
    make = flex.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **options: make(**options | {"_compile": False}))
    model = LanguageModel.load(saved(model_type), attention="flex_attention").eval()
    assert model.layout == "packed"
    assert not model.shares_prompts  # it adds a mask of what is seen to its scores
    check_same_as_alone(model, LanguageModel.load(saved(model_type)).eval(), layout)
