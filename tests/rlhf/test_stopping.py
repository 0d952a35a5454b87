"""A chat model ends its turns with a token of its own: training data end with it, and sampling stops at it."""

from __future__ import annotations

import json

import pytest
import torch
from tools import WORDS, metrics, tiny_gpt2, write_jsonl
from transformers import GenerationConfig

from rlhf import ppo, reward, sft
from rlhf.config import EvaluateConfig, GenerateConfig, LengthConfig
from rlhf.data import Limits, read_demonstrations, tokenize_demonstrations
from rlhf.demo.pretrain import make_tokenizer
from rlhf.evaluate import evaluate, generate
from rlhf.loading import end_token_ids, load_tokenizer
from rlhf.models import LanguageModel
from rlhf.rollout import sample

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <end_of_turn> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A model whose chat template ends turns with <end_of_turn>. It often says that token, and never EOS."""
    tokenizer = make_tokenizer([*WORDS, "user", "assistant"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    model = tiny_gpt2(len(tokenizer), tokenizer.eos_token_id, tie_word_embeddings=False)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    with torch.no_grad():  # one hidden value is constant, so its weights set how likely both tokens are
        model.transformer.ln_f.bias[0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[end, 0] = 3.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -100.0
    directory = tmp_path_factory.mktemp("chat")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory), end


def conversation(i):
    turns = [{"role": "user", "content": f"w{i:02d}"}, {"role": "assistant", "content": f"w{i + 1:02d} w{i + 2:02d}"}]
    return {"messages": turns}


@pytest.fixture
def demonstrations(tmp_path):
    return write_jsonl(tmp_path / "chat.jsonl", [conversation(i) for i in range(24)])


@pytest.fixture
def prompts(tmp_path):
    return write_jsonl(tmp_path / "asked.jsonl", [{"prompt": conversation(i)["messages"][:1]} for i in range(24)])


def test_training_data_end_as_a_turn_does(chat, demonstrations):
    path, end = chat
    tokenizer = load_tokenizer(path)
    examples = tokenize_demonstrations(read_demonstrations(demonstrations), tokenizer, Limits(32, 16, 64))
    assert tokenizer.decode(examples[0].prompt_ids) == "user w00 <end_of_turn> assistant"
    assert tokenizer.decode(examples[0].completion_ids) == "w01 w02 <end_of_turn>"
    assert {example.completion_ids[-1] for example in examples} == {end}


def test_ends_are_those_of_tokenizer_template_and_generation_config(chat, base, tmp_path):
    path, end = chat
    tokenizer = load_tokenizer(path)
    assert end_token_ids(path, tokenizer) == {tokenizer.eos_token_id, end}
    model = LanguageModel.load(path).model
    model.generation_config = GenerationConfig(eos_token_id=[5, 6])
    model.save_pretrained(tmp_path)
    assert end_token_ids(str(tmp_path), tokenizer) == {tokenizer.eos_token_id, end, 5, 6}
    assert end_token_ids(model, tokenizer) == {tokenizer.eos_token_id, end, 5, 6}
    (tmp_path / "generation_config.json").unlink()
    assert end_token_ids(str(tmp_path), tokenizer) == {tokenizer.eos_token_id, end}
    plain = load_tokenizer(base)
    assert end_token_ids(base, plain) == {plain.eos_token_id}


def test_several_ends(chat):
    model = LanguageModel.load(chat[0]).eval()
    torch.manual_seed(0)
    ends = {10, 11, chat[1]}
    completions = sample(model, [[5, 6]] * 200, end_token_ids=ends, max_new_tokens=12)
    assert {completion.tokens[-1] for completion in completions if len(completion.tokens) < 12} == ends
    assert not any(ends & set(completion.tokens[:-1]) for completion in completions)


def test_generate_and_evaluate_stop_there(chat, prompts, tmp_path):
    path, _ = chat
    lengths = LengthConfig(max_prompt_tokens=16, max_response_tokens=20)
    common = {"lengths": lengths, "device": "cpu", "prompts": prompts}
    generate(GenerateConfig(model=path, output_dir=str(tmp_path / "samples"), samples=4, **common))
    evaluate(EvaluateConfig(model=path, baseline=path, output_dir=str(tmp_path / "evaluation"), **common))
    generated = [json.loads(line) for line in (tmp_path / "samples/completions.jsonl").read_text().splitlines()]
    judged = [json.loads(line) for line in (tmp_path / "evaluation/completions.jsonl").read_text().splitlines()]
    texts = [text for record in generated for text in record["completions"]] + [r["completions"][0] for r in judged]
    assert not any("<end_of_turn>" in text for text in texts)
    assert sum(len(text.split()) for text in texts) / len(texts) < 12  # the limit is 20, so most have ended before


def test_all_stages_and_the_rollout(chat, demonstrations, prompts, sft_config, reward_config, ppo_config, tmp_path):
    path, end = chat
    pairs = [
        {
            "prompt": c["messages"][:1],
            "chosen": c["messages"][1:],
            "rejected": [{"role": "assistant", "content": "w50"}],
        }
        for c in (conversation(i) for i in range(24))
    ]
    compared = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    trained = sft.train(sft_config(model=path, data=demonstrations, epochs=1))
    assert end in end_token_ids(str(trained), load_tokenizer(str(trained)))
    ranker = reward.train(reward_config(model=str(trained), data=compared, epochs=1))
    lengths = LengthConfig(max_prompt_tokens=16, max_response_tokens=20)
    config = ppo_config(policy=str(trained), reward_model=str(ranker), prompts=prompts, episodes=32, lengths=lengths)
    ppo.train(config)
    records = metrics(tmp_path / "ppo")
    assert min(record["ended"] for record in records) > 0.5
    assert max(record["response_tokens"] for record in records) < 15
