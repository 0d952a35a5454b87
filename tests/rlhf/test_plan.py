"""What a plan counts is what a run takes: weights and activations to the byte, the peak to a few percent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_types import TYPES, tiny
from test_memory import saved_bytes
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config import PPOConfig, RewardConfig, RunConfig, SFTConfig
from rlhf.decoding import make_cache
from rlhf.loading import ModelError
from rlhf.lora import add_adapter
from rlhf.models import LanguageModel, ScalarModel
from rlhf.plan import Machine, measure, plan, room

HERE = Machine(1, 1e11, 1e10, 2**34, on_gpu=False)
EIGHT = Machine(8, 4e14, 3e12, 2**36, on_gpu=True)


def run_config(**options):
    return RunConfig(output_dir="-", **options)


@pytest.mark.long_for(model_type=TYPES.keys() - {"gpt2", "llama", "gemma2"})
@pytest.mark.parametrize("model_type", sorted(TYPES.keys() - {"rwkv"}))  # which has no pass without its own kernels
def test_weights_and_activations(model_type, tokenizer, tmp_path):
    tiny(model_type, len(tokenizer), tokenizer.eos_token_id).save_pretrained(tmp_path)
    if model_type == "minimax":
        with pytest.raises(ModelError, match="what its passes keep can't be counted"):
            measure(LanguageModel, tmp_path, run_config(), trained=True, rows=3, length=16)
        return
    model = LanguageModel.load(tmp_path).eval()
    sizes = measure(LanguageModel, tmp_path, run_config(), trained=True, rows=3, length=16)
    assert sizes.weights == sizes.trained == sum(p.numel() for p in model.parameters())
    assert sizes.blocks == len(model.blocks)
    assert sizes.outside == sizes.weights - sum(p.numel() for block in model.blocks for p in block.parameters())
    ids = torch.zeros(3, 16, dtype=torch.long)
    real = saved_bytes(model, lambda: model.inner(input_ids=ids, use_cache=False).last_hidden_state.sum())
    counted = (sizes.passes.kept_in_blocks + sizes.passes.kept_outside) * 48
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        assert 0.9 * real < counted < 2 * real
    else:  # masks and positions are made anew in every pass
        assert counted == pytest.approx(real, rel=0.2)


def test_adapter(base):
    config = run_config(lora={"rank": 4})
    for kind in (LanguageModel, ScalarModel):
        model = kind.load(base)
        add_adapter(model, config.lora, base, merged=True)
        sizes = measure(kind, base, config, trained=True, rows=2, length=8)
        assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sizes.weights == sum(p.numel() for p in kind.load(base).parameters())


def test_cache(base):
    sizes = measure(LanguageModel, base, run_config(), trained=True, rows=1, length=8)
    assert sizes.cache_bytes == 2 * 2 * 32 * 4  # two layers, keys and values of 32
    model = LanguageModel.load(base).eval()
    cache = make_cache(model.model.config)
    for length in (10, *[1] * 20):
        ids = torch.zeros(1, length, dtype=torch.long)
        model.inner(input_ids=ids, use_cache=True, past_key_values=cache)
    assert cache.layers[0].rooms["keys"].shape[-2] == room(10, 30)


def ppo_config(base, **options):
    options = {"policy": base, "reward_model": base, "prompts": ["-"], "output_dir": "-", "batch_size": 16} | options
    return PPOConfig(**{"minibatch_size": 8, "episodes": 16} | options)


def test_parts_of_ppo(base):
    """Sixteen bytes for a weight that is trained, with its gradient, and four for one that is not; less by shards."""
    count = measure(LanguageModel, base, run_config(), trained=True, rows=1, length=8).weights
    head = 32
    whole = plan(ppo_config(base), HERE).parts
    assert whole["policy: weights"] == whole["reference: weights"] == whole["average of the policy"] == 4 * count
    assert whole["policy: Adam's averages"] == 8 * count
    assert whole["value model: weights"] == whole["reward model: weights"] == 4 * (count + head)
    half = plan(ppo_config(base, frozen_dtype="bfloat16", ema_decay=0.0), HERE).parts
    assert half["reference: weights"] == 2 * count
    assert "average of the policy" not in half
    split = plan(ppo_config(base, sharding="full"), EIGHT).parts
    assert split["policy: Adam's averages"] == count
    assert "policy: buckets of gradients" not in split
    assert plan(ppo_config(base), EIGHT).parts["policy: buckets of gradients"] == 4 * count
    adapted = plan(ppo_config(base, lora={"rank": 4}), HERE).parts
    assert not {"reference: weights", "reward model: weights"} & adapted.keys()
    assert 4 * count < adapted["policy: weights"] < 5 * count


def test_rollout_of_split_weights(base):
    """Weights are gathered whole only where they take at most half of what is free."""
    config = ppo_config(base, sharding="full")
    assert "rollout" in plan(config, EIGHT).moments
    small = plan(config, replace(EIGHT, memory=1e9)).moments
    assert "rollout, gathering blocks for every token" in small


def test_moments(base):
    plain = plan(ppo_config(base), HERE).moments
    assert set(plain) == {"rollout", "scoring", "policy step", "value step"}
    less = plan(ppo_config(base, gradient_checkpointing=True), HERE).moments
    assert less["policy step"] < plain["policy step"]
    mixed = plan(ppo_config(base, gamma_ptx=1.0, pretraining_data=["-"], pretraining_tokens=32), HERE)
    assert mixed.moments["pretraining step"] > plain["policy step"]
    assert mixed.seconds.keys() == {"rollout", "scoring", "training", "pretraining mix"}
    for config in (
        SFTConfig(output_dir="-", model=base, data=["-"]),
        RewardConfig(output_dir="-", model=base, data="-"),
    ):
        assert plan(config, HERE).peak > plan(config, EIGHT).parts["model: weights"]


def test_command(rlhf, tmp_path):
    """A configuration is enough. A recipe names the rest."""
    large = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    large.architectures = ["LlamaForCausalLM"]
    large.save_pretrained(tmp_path)
    models = ["--policy", tmp_path, "--reward_model", tmp_path]
    rates = ["--devices", 8, "--tflops", 400, "--bandwidth", 3000]
    status, error = rlhf("plan", "ppo", "--config", "6b/ppo", *models, "--sharding", "full", "--device", "null", *rates)
    assert status == 0, error
    assert re.search(r"reference: weights +│ +3\.1\d", error)  # of 6.7e9 weights of 4 bytes, an eighth
    assert "at most" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ppo", "--policy", "/nowhere", "--reward_model", "/nowhere"], "/nowhere: no such directory"),
        (["sft", "--model", "m", "--tflops", -1], "tflops: is -1.0, must be above 0"),
        (["sft", "--model", "m", "--tflops", 1], "tflops, bandwidth: one of them is given"),
        (["sft", "--model", "m", "--tflops", 1, "--bandwidth", "nan"], "bandwidth: is nan, must be above 0"),
        (["sft", "--model", "m", "--devices", 0], "devices: is 0, must be at least 1"),
        (["sft", "--model", "m", "--epochs", 0], "rlhf plan sft: error: epochs: is 0, must be at least 1"),
    ],
)
def test_errors(words, says, rlhf):
    status, error = rlhf("plan", *words, "--device", "cpu")
    assert status == 2
    assert says in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.long
def test_peak(base, reward_model, data, tmp_path, tokenizer):
    """Measured in a process of its own, whose allocator gives back what is free."""
    config = AutoConfig.for_model(
        "gpt2", n_embd=512, n_layer=6, n_head=8, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 50:02d}" for i in range(9000)))
    two = tmp_path / "two.jsonl"  # two steps, each with one of them
    two.write_text("".join(Path(data.demonstrations).read_text().splitlines(keepends=True)[:2]))
    settings = ["sft", "--model", tmp_path / "model", "--data", two, "--pretraining_data", text]
    settings += ["--pretraining_fraction", 0.9, "--pretraining_tokens", 500, "--batch_size", 10, "--epochs", 1]
    code = "import sys,resource,psutil,rlhf.plan;from rlhf.__main__ import main\n"
    code += "before=psutil.Process().memory_info().rss;s=main();"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024-before);sys.exit(s)"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, settings), "--device", "cpu", "--output_dir", tmp_path / "run"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    config = SFTConfig(
        output_dir="-", model=str(tmp_path / "model"), data=["-"], pretraining_data=["-"], pretraining_fraction=0.9,
        pretraining_tokens=500, batch_size=10, lengths={"max_prompt_tokens": 250, "max_response_tokens": 250},
    )  # fmt: skip
    found = plan(config, HERE)
    peak = found.peak - found.parts["Python and its libraries"]  # this process holds what tests before have left
    assert peak == pytest.approx(int(done.stdout.splitlines()[-1]), rel=0.15)
