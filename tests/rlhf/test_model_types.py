"""Every type of model goes through the three stages. What an unknown type might do wrong is found out and refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from model_types import TYPES, tiny
from tools import metrics
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf import models, ppo, report, reward, sft
from rlhf.batch import Group, groups_of_one
from rlhf.loading import ModelError, load_tokenizer
from rlhf.models import LanguageModel, ScalarModel
from rlhf.rollout import sample
from rlhf_kernels import linear_selective_log_softmax

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
RESPONSES = [[16, 17, 18, 19, 20, 21], [22, 23, 24, 25], [26, 27, 28]]
# Types that need a row for each sequence, and below those that cannot be sampled in a left-padded batch.
PADDED = {
    "bamba", "biogpt", "bloom", "falcon_h1", "falcon_mamba", "gpt_oss", "granitemoehybrid", "jamba", "lfm2", "mamba",
    "mamba2", "minimax", "mpt", "openai-gpt", "opt", "qwen3_next", "recurrent_gemma", "rwkv", "xglm", "xlstm", "zamba2",
}  # fmt: skip
# Types whose attention reaches only so far, for which prompts are not shared.
WINDOWED = {"cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_neo", "llama4_text", "mistral"}
# What is common, and one of each kind of what is not: the other types are long.
QUICK = {
    "bloom", "cohere", "falcon_h1", "gemma2", "gpt2", "gpt_neo", "gpt_oss", "granite", "jamba", "llama", "llama4_text",
    "mamba", "minimax", "mistral", "opt", "qwen3", "qwen3_next", "rwkv",
}  # fmt: skip
DECODING = {"mamba": "aligned", "falcon_mamba": "aligned"} | dict.fromkeys(
    ("minimax", "openai-gpt", "recurrent_gemma", "rwkv", "xlstm"), "whole"
)


@pytest.fixture(scope="module", params=TYPES)
def directory(request, tmp_path_factory, tokenizer):
    """The directory of a model with large weights, the directory of its tokenizer, and its type.

    The two directories differ, since transformers takes any tokenizer beside a Qwen 2 for Qwen 2's own.
    """
    path, beside = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("tokenizer")
    tiny(request.param, len(tokenizer), tokenizer.eos_token_id).save_pretrained(path)
    tokenizer.save_pretrained(beside)
    return path, str(beside), request.param


@pytest.mark.long_for(directory=TYPES.keys() - QUICK)
def test_type(directory, caplog, monkeypatch, sft_config, reward_config, ppo_config, tmp_path):
    monkeypatch.setattr(report, "plot_history", lambda *_: None)  # a stage's figure takes longer than its training
    path, tokenizer, model_type = directory
    monkeypatch.setattr(models, "_said", set())
    with caplog.at_level(logging.WARNING, "rlhf"):
        model = LanguageModel.load(str(path)).eval()
    assert model.layout == ("padded" if model_type in PADDED else "packed")
    assert model.decoding == DECODING.get(model_type, "padded")
    assert ("see each other" in caplog.text) == (model.layout == "padded")
    assert ("other logits with a cache" in caplog.text) == (model.decoding != "padded")

    # Log-probs in a batch are those of each sequence alone, through the model's own logits.
    with torch.no_grad():
        ours = model(model.lay_out(groups_of_one(PROMPTS, RESPONSES)), linear_selective_log_softmax)
        alone = [
            model.model(torch.tensor([p + r]), use_cache=False).logits[0].float().log_softmax(-1)[len(p) - 1 : -1]
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
    expected = [a.gather(1, torch.tensor(r)[:, None])[:, 0] for a, r in zip(alone, RESPONSES, strict=True)]
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-4, rtol=0)

    # So are those of responses that follow their prompt in one row.
    assert model.shares_prompts == (model.layout == "packed" and model_type not in WINDOWED)
    groups = [Group(PROMPTS[0], RESPONSES * 2), Group(PROMPTS[1], RESPONSES[:2])]
    with torch.no_grad():
        ours = model(model.lay_out(groups), linear_selective_log_softmax)
        apart = model.lay_out([unit for group in groups for unit in group.units("packed")])
        torch.testing.assert_close(ours, model(apart, linear_selective_log_softmax), atol=1e-4, rtol=0)

    # Two steps of each stage. With weights this large, a step at a higher learning rate would end in NaN.
    common = {"adam": {"learning_rate": 1e-5}, "tokenizer": tokenizer}
    trained = sft.train(sft_config(model=str(path), epochs=1, batch_size=20, residual_dropout=0.0, **common))
    ranker = reward.train(reward_config(model=str(trained), epochs=1, batch_size=12, **common))
    options = {"episodes": 16, "batch_size": 8, "value_adam": common["adam"], **common}
    policy = ppo.train(ppo_config(policy=str(trained), reward_model=str(ranker), **options))
    history = metrics(tmp_path / "ppo")
    assert len(metrics(tmp_path / "sft")) == len(metrics(tmp_path / "reward")) == len(history) == 2
    assert max(record["ratio_max_deviation"] for record in history) < 1e-3

    assert type(AutoModelForCausalLM.from_pretrained(policy)) is type(model.model)
    before, after = ScalarModel.load(str(ranker)), ScalarModel.load(str(tmp_path / "ppo/value"))
    assert [p.shape for p in before.parameters()] == [p.shape for p in after.parameters()]


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 57, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))


def with_hook(model, change):
    """The model with its hidden states changed, like a type that this library has never seen."""

    def hook(_module, _arguments, output):
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    model.model.register_forward_hook(hook)
    return model


def carry_a_state(states):
    """A state that runs through a whole row, as in a recurrent layer that does not know where a sequence begins."""
    return states + 0.01 * states.cumsum(1)


def see_the_batch(states):
    return states + 0.01 * states.mean((0, 1))


def test_a_state_that_leaks_is_found(caplog, monkeypatch):
    monkeypatch.setattr(models, "_said", set())
    with caplog.at_level(logging.WARNING, "rlhf"):
        model = LanguageModel(with_hook(llama(), carry_a_state)).eval()
    assert (model.layout, model.decoding) == ("padded", "whole")
    assert "llama models let sequences laid end to end see each other (packed: they differ by" in caplog.text
    assert "llama models give other logits with a cache than without" in caplog.text
    torch.manual_seed(0)
    completions = sample(model, PROMPTS, end_token_ids={1}, max_new_tokens=6)
    with torch.no_grad():
        batch = model.lay_out(groups_of_one(PROMPTS, [completion.tokens for completion in completions]))
        expected = model(batch, linear_selective_log_softmax)
    torch.testing.assert_close(torch.cat([c.logprobs for c in completions]), expected, atol=1e-5, rtol=0)


def test_a_warning_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(models, "_said", set())
    with caplog.at_level(logging.WARNING, "rlhf"):
        for _ in range(3):
            LanguageModel(with_hook(llama(), carry_a_state))
    assert len(caplog.records) == 2


def test_what_is_right_in_no_layout_is_refused():
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: hidden states of sequences in a batch .*packed.*padded"):
        LanguageModel(with_hook(llama(), see_the_batch))


def test_several_end_tokens_in_the_configuration():
    """Llama 3's configuration has several."""
    model = llama()
    model.config.eos_token_id = [1, 5, 6]
    assert LanguageModel(model).layout == "packed"


def test_nan_weights_are_refused():
    model = llama()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ModelError, match="they differ by inf"):
        LanguageModel(model)


def test_missing_weights_are_refused(tmp_path, tokenizer):
    """transformers would fill them with random numbers and go on."""
    model = llama()
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    tokenizer.save_pretrained(tmp_path)
    for kind in (LanguageModel, ScalarModel):
        with pytest.raises(
            ModelError, match=r"lacks weights of Llama\w+: model\.layers\.1\.mlp\.\w+\.weight.*3 in all"
        ):
            kind.load(str(tmp_path))


@pytest.mark.parametrize("model_type", ["granite", "falcon_h1", "mamba", "llama4_text", "llama"])
def test_transformers_alone_loads_a_reward_model(model_type, tmp_path, tokenizer):
    """The lines in the README.md beside it do so, also for types for which transformers has no classifier."""
    tiny(model_type, len(tokenizer), tokenizer.eos_token_id).save_pretrained(tmp_path / "lm")
    ours = ScalarModel.load(str(tmp_path / "lm")).eval()
    torch.nn.init.normal_(ours.head.weight)
    ours.bias = -0.75
    ours.save(tmp_path / "rm", load_tokenizer_from(tokenizer, tmp_path / "rm"))
    card = (tmp_path / "rm/README.md").read_text()
    assert "rlhf adds -0.75 to what the lines above give" in card
    lines = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/directory", str(tmp_path / "rm"))
    names: dict = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    exec(lines, names)
    batch = ours.lay_out([Group([5], [[6, 7, 8]])])
    with torch.no_grad():
        torch.testing.assert_close(names["scores"][0, -1] - 0.75, ours(batch, batch.last)[0], atol=1e-5, rtol=1e-5)
    again = ScalarModel.load(str(tmp_path / "rm")).eval()
    with torch.no_grad():
        assert torch.equal(again(batch, batch.last), ours(batch, batch.last))


def load_tokenizer_from(tokenizer, directory):
    tokenizer.save_pretrained(directory)
    return load_tokenizer(str(directory))


def test_a_head_with_a_bias_holds_it(tmp_path, tokenizer):
    model = llama()
    model.save_pretrained(tmp_path / "lm")
    ours = ScalarModel.load(str(tmp_path / "lm")).eval()
    ours.model.score = torch.nn.Linear(32, 1, bias=True)
    ours.bias = 0.5
    assert ours.head.bias.item() == 0.5
    batch = ours.lay_out([Group([5], [[6, 7, 8]])])
    with torch.no_grad():
        value = ours(batch, batch.last)
        torch.testing.assert_close(value, ours.model(torch.tensor([[5, 6, 7, 8]])).logits[0])
    assert "reward_bias" not in ours.card()


def test_the_page_on_models_says_what_was_tried():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    table = page.partition("| --- | --- | --- |")[2].partition("## Not")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines()]
    said = {
        name.strip(): (batches.split()[0].strip(":"), sampling.strip())
        for names, batches, sampling in filter(None, rows)
        for name in names.split(",")
    }
    how = {"padded": "left-padded, cache", "aligned": "prompts of one length, cache", "whole": "no cache"}
    assert said.keys() == TYPES.keys()
    for name, (batches, sampling) in said.items():
        assert batches == ("padded" if name in PADDED else "packed"), name
        assert sampling.startswith(how[DECODING.get(name, "padded")]), name
