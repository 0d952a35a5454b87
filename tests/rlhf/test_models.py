"""Models and tokenizers: log-probs of several architectures, and everything that is refused."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from tools import WORDS, only_line, tiny_gpt2, write_jsonl
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf import ppo
from rlhf.batch import Group, groups_of_one
from rlhf.demo.pretrain import make_tokenizer
from rlhf.loading import (
    ModelError,
    check_embedded,
    check_reward_config,
    check_same_tokenizer,
    context_length,
    load_config,
    load_tokenizer,
)
from rlhf.models import LanguageModel, ScalarModel
from rlhf.reward import score
from rlhf.rollout import sample
from rlhf_kernels import linear_cross_entropy, linear_selective_log_softmax

VOCABULARY = 57
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
KEY_VALUE = {"num_key_value_heads": 2}
ARCHITECTURES = {
    "gpt2": lambda: tiny_gpt2(VOCABULARY, 1),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **KEY_VALUE)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **KEY_VALUE, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **KEY_VALUE, head_dim=8, final_logit_softcapping=2.0, sliding_window=8)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, **KEY_VALUE, logits_scaling=3.0)),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
RESPONSES = [[14, 15, 1], [16, 17, 18, 19, 1], [20]]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    torch.manual_seed(0)
    return LanguageModel(ARCHITECTURES[request.param]()).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_logits(architecture, temperature):
    """From packed hidden states, against each sequence alone through the model's own head, softcap and scale."""
    batch = architecture.lay_out(groups_of_one(PROMPTS, RESPONSES))
    with torch.no_grad():
        ours = architecture(batch, linear_selective_log_softmax, temperature=temperature)
        parts = []
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            logits = architecture.model(torch.tensor([prompt + response])).logits[0].float()
            logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            parts.append(logprobs.gather(1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(ours, torch.cat(parts), atol=2e-5, rtol=2e-5)


def test_gradients_are_those_of_the_logits(architecture):
    batch = architecture.lay_out(groups_of_one(PROMPTS, RESPONSES))
    loss = architecture(batch, linear_cross_entropy, reduction="sum")
    loss.backward()
    ours = {name: p.grad.clone() for name, p in architecture.named_parameters() if p.grad is not None}
    architecture.zero_grad()
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = architecture.model(torch.tensor([prompt + response])).logits[0].float()
        torch.nn.functional.cross_entropy(
            logits[len(prompt) - 1 : -1], torch.tensor(response), reduction="sum"
        ).backward()
    for name, parameter in architecture.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=2e-4, rtol=1e-3, msg=name)


def test_samples_of_every_architecture(architecture):
    """The cache and left padding: log-probs kept while sampling are those of the packed pass."""
    torch.manual_seed(0)
    completions = sample(architecture, PROMPTS, end_token_ids={1}, max_new_tokens=12)
    with torch.no_grad():
        batch = architecture.lay_out(groups_of_one(PROMPTS, [completion.tokens for completion in completions]))
        expected = architecture(batch, linear_selective_log_softmax)
    torch.testing.assert_close(torch.cat([c.logprobs for c in completions]), expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", ["llama", "neox", "gemma2"])
def test_scores_of_other_architectures(name, tmp_path, tokenizer):
    """A reward model on each backbone, saved and read back."""
    torch.manual_seed(0)
    ARCHITECTURES[name]().save_pretrained(tmp_path / "lm")
    attention = "eager" if name == "gemma2" else "sdpa"  # its attention has a softcap, which SDPA has not
    model = ScalarModel.load(str(tmp_path / "lm"), attention=attention).eval()
    torch.nn.init.normal_(model.head.weight)
    model.bias = 0.5
    ours = score(model, groups_of_one(PROMPTS, RESPONSES), 1000)
    for value, prompt, response in zip(ours, PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            logits = model.model(torch.tensor([prompt + response])).logits[0, 0]
        torch.testing.assert_close(value, logits + 0.5, atol=1e-5, rtol=1e-5)
    model.save(tmp_path / "rm", tokenizer)
    check_reward_config(str(tmp_path / "rm"))
    again = ScalarModel.load(str(tmp_path / "rm"), attention=attention).eval()
    torch.testing.assert_close(score(again, groups_of_one(PROMPTS, RESPONSES), 1000), ours)


def test_logits_are_never_built(lm, monkeypatch):
    """The model's own head runs neither for a loss nor for log-probs."""

    def forbidden(*_, **__):
        raise AssertionError("the model's forward, which builds logits, was called")

    monkeypatch.setattr(type(lm.model), "forward", forbidden)
    batch = lm.lay_out(groups_of_one(PROMPTS, RESPONSES))
    lm(batch, linear_cross_entropy, reduction="sum")
    lm(batch, linear_selective_log_softmax)


def test_unsupported_architecture_is_refused():
    """A head that does more than project."""

    class Doubled(LlamaForCausalLM):
        def forward(self, *arguments, **options):
            result = super().forward(*arguments, **options)
            result.logits = result.logits * 2
            return result

    with pytest.raises(
        ModelError, match="Doubled: its logits are not its last hidden state times its output embeddings"
    ):
        LanguageModel(Doubled(LlamaConfig(**SIZES, **KEY_VALUE)))


def test_model_is_as_it_was_after_the_check():
    model = tiny_gpt2(VOCABULARY, 1).train()
    assert LanguageModel(model).model.training
    model.eval()
    assert not LanguageModel(model).model.training


def test_encoder_decoder_is_refused(tmp_path):
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
        )
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="could not be loaded as AutoModelForCausalLM"):
        LanguageModel.load(str(tmp_path))


def copy_of(directory, target):
    shutil.copytree(directory, target)
    return str(target)


def test_same_tokenizer(base, reward_model):
    check_same_tokenizer(load_tokenizer(base), base, reward_model)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*WORDS, "another"], r"57 and 58 tokens, for example 'another'"),
        (["v00", *WORDS[1:]], r"57 and 57 tokens, for example 'v00'"),
    ],
    ids=["one more", "one other"],
)
def test_other_tokenizer_is_refused(base, reward_model, tmp_path, words, says):
    other = copy_of(reward_model, tmp_path / "other")
    make_tokenizer(words).save_pretrained(other)
    with pytest.raises(ModelError, match=says) as error:
        check_same_tokenizer(load_tokenizer(base), base, other)
    assert base in str(error.value)
    assert other in str(error.value)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", {"model": "more", "data": "demonstrations"}),
        ("sft", {"model": "more", "data": "seen", "pretraining_data": "texts", "pretraining_fraction": 0.5}),
        ("reward", {"model": "more", "data": "comparisons"}),
        ("ppo", {"policy": "more", "reward_model": "more reward", "prompts": "prompts"}),
        ("generate", {"model": "more", "prompts": "prompts"}),
        ("evaluate", {"model": "more", "baseline": "more", "pretraining_data": "texts"}),
    ],
)
def test_a_token_without_an_embedding_is_refused(stage, options, rlhf, base, reward_model, tmp_path):
    """The tokenizer got a token that the model did not get. Data without it can be used."""
    more = copy_of(base, tmp_path / "more")
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens("another")
    tokenizer.save_pretrained(more)
    scores = copy_of(reward_model, tmp_path / "more reward")
    shutil.copytree(more, scores, dirs_exist_ok=True, ignore=lambda *_: {"config.json", "model.safetensors"})
    files = {"more": more, "more reward": scores}
    for name, record in {
        "demonstrations": {"prompt": "w00 w01", "completion": "w02 another"},
        "seen": {"prompt": "w00 w01", "completion": "w02"},
        "comparisons": {"prompt": "w00", "completions": ["w01", "another w02"], "ranks": [1, 2]},
        "prompts": {"prompt": "w00 another"},
        "texts": {"text": "w00 w01 w02 another " * 40},
    }.items():
        files[name] = write_jsonl(tmp_path / f"{name}.jsonl", [record] * 4)
    if "pretraining_data" in options:
        options = options | {"pretraining_tokens": 16}
    if "prompts" in options:
        options = options | {"lengths.max_response_tokens": 8}
    settings = [word for name, value in options.items() for word in (f"--{name}", files.get(value, value))]
    status, error = rlhf(stage, *settings, "--output_dir", tmp_path / "run")
    assert status == 2
    assert only_line(error) == (
        f"rlhf {stage}: error: {more}: has embeddings for 57 tokens, and the data has 'another', number 57 of the "
        "tokenizer; resize them (the model's resize_token_embeddings), and save the model again"
    )
    check_embedded(tokenizer, [Group([0, 56], [])], more)


def test_other_eos_is_refused(base, tmp_path, tokenizer):
    other = copy_of(base, tmp_path / "other")
    changed = load_tokenizer(other)
    changed.eos_token = "w03"
    changed.save_pretrained(other)
    with pytest.raises(ModelError, match="eos is '<eos>' / 'w03'"):
        check_same_tokenizer(load_tokenizer(base), base, other)


def test_tokenizer_without_eos_is_refused(base, tmp_path):
    other = copy_of(base, tmp_path / "other")
    tokenizer = load_tokenizer(other)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="no eos_token"):
        load_tokenizer(other)


def test_two_labels_are_refused(base, tmp_path, tokenizer):
    model = GPT2ForSequenceClassification.from_pretrained(base, num_labels=2)
    model.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="has 2 labels, but a reward model has one"):
        check_reward_config(str(tmp_path / "two"))


def test_language_model_is_no_reward_model(base, ppo_config):
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel.* is not a reward model; train one with `rlhf reward`"):
        check_reward_config(base)
    with pytest.raises(ModelError, match="is not a reward model"):
        ppo.train(ppo_config(reward_model=base))


@pytest.mark.parametrize("load", [load_config, load_tokenizer, LanguageModel.load, ScalarModel.load])
def test_no_such_directory(load, tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path}/absent: no such directory"):
        load(f"{tmp_path}/absent")


@pytest.mark.parametrize("load", [LanguageModel.load, ScalarModel.load, load_tokenizer, load_config])
def test_empty_directory(load, tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)) as error:
        load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_damaged_weights(base, tmp_path):
    other = copy_of(base, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ModelError, match="could not be loaded as AutoModelForCausalLM") as error:
        LanguageModel.load(other)
    assert "\n" not in str(error.value)


def test_weights_are_float32_and_dropout_is_off(base, tmp_path):
    tiny_gpt2(VOCABULARY, 1).bfloat16().save_pretrained(tmp_path)
    for model in (LanguageModel.load(str(tmp_path)), ScalarModel.load(str(tmp_path)), LanguageModel.load(base)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_no_residual_dropout_to_set_is_said(tmp_path, caplog):
    LlamaForCausalLM(LlamaConfig(**SIZES, **KEY_VALUE)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "rlhf"):
        LanguageModel.load(str(tmp_path), residual_dropout=0.2)
    assert "llama models have no residual dropout" in caplog.text
    caplog.clear()
    LanguageModel.load(str(tmp_path))
    assert "residual dropout" not in caplog.text


def test_context_length(base):
    assert context_length(load_config(base)) == 64


def test_packed_sequences_do_not_see_each_other(lm):
    """When one sequence changes, the log-probs of the others stay the same to the last bit."""
    with torch.no_grad():
        first = lm(lm.lay_out(groups_of_one(PROMPTS, RESPONSES)), linear_selective_log_softmax)
        second = lm(lm.lay_out(groups_of_one([PROMPTS[0], [30], PROMPTS[2]], RESPONSES)), linear_selective_log_softmax)
    assert torch.equal(first[:3], second[:3])
    assert torch.equal(first[-1:], second[-1:])
    assert not torch.equal(first[3:8], second[3:8])
