"""Adapters of low rank: off, they leave the model's bits; on, they are what peft computes; saved, peft reads them."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from model_types import tiny
from safetensors.torch import load_file
from tools import metrics, only_line, stop_at_step_3
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf import ppo, reward, sft, training
from rlhf.batch import groups_of_one
from rlhf.config import LoRA
from rlhf.loading import ModelError, check_reward_config, load_tokenizer
from rlhf.lora import add_adapter, without_adapter
from rlhf.models import LanguageModel, ScalarModel
from rlhf.settings import ConfigError
from rlhf_kernels import linear_selective_log_softmax

PROMPTS, RESPONSES = [[5, 6, 7], [8, 9]], [[10, 11, 12, 13], [14, 15]]
RATE = {"adam": {"learning_rate": 1e-2}}


def logprobs(model):
    with torch.no_grad():
        return model(model.lay_out(groups_of_one(PROMPTS, RESPONSES)), linear_selective_log_softmax)


def scores(model):
    with torch.no_grad():
        batch = model.lay_out(groups_of_one(PROMPTS, RESPONSES))
        return model(batch, batch.last)


def adapted(model, source, **options):
    """A model whose adapter changes what it computes."""
    torch.manual_seed(3)
    add_adapter(model, LoRA(rank=4, **options), source, merged=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    """A directory with a model whose head is a matrix of its own."""
    directory = tmp_path_factory.mktemp("llama")
    model = tiny("llama", len(tokenizer), tokenizer.eos_token_id)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


HEADS = [{}, {"target_modules": ["q_proj", "lm_head"]}]


def test_off_it_leaves_the_model_s_bits(base, reward_model):
    for make, path, read in ((LanguageModel, base, logprobs), (ScalarModel, reward_model, scores)):
        before = read(make.load(path).eval())
        model = make.load(path).eval()
        add_adapter(model, LoRA(rank=4), path, merged=False)
        torch.testing.assert_close(read(model), before, atol=1e-6, rtol=1e-6)  # it changes nothing yet
        model = adapted(make.load(path), path)
        assert (read(model) - before).abs().max() > 0.1
        with without_adapter(model.model):
            assert torch.equal(read(model), before)
        assert (read(model) - before).abs().max() > 0.1
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if "lora_" in name or "modules_to_save" in name}


@pytest.mark.parametrize("options", HEADS, ids=["all-linear", "head"])
def test_the_adapter_of_a_head_is_part_of_the_head(llama, options):
    """The log-probs are those of the logits that the model itself gives, also where it decodes."""
    model = adapted(LanguageModel.load(llama), llama, **options)
    ids = torch.tensor([[*PROMPTS[0], *RESPONSES[0]]])
    with torch.no_grad():
        logits = model.model(ids).logits[0]
    expected = logits.log_softmax(-1)[2:6].gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(logprobs(model)[:4], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.next_logits([ids[0].tolist()])[0], logits[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("options", HEADS, ids=["all-linear", "head"])
def test_saved(llama, base, tokenizer, tmp_path, options, merged):
    """Merged or not, it loads as the model that it was, in this library and in transformers with peft."""
    for name, source in (("llama", llama), ("gpt2", base)):
        model = adapted(LanguageModel.load(source), source, **(options if name == "llama" else {}))
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        expected = logprobs(model)
        directory = tmp_path / name
        model.save(directory, tokenizer, merged=merged)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert (directory / "adapter_model.safetensors").exists() != merged
        torch.testing.assert_close(logprobs(LanguageModel.load(directory).eval()), expected, atol=1e-5, rtol=1e-5)
        if merged:
            theirs = AutoModelForCausalLM.from_pretrained(directory)
        else:
            theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), directory)
            auto = peft.AutoPeftModelForCausalLM.from_pretrained(directory)
        ids = torch.tensor([[*PROMPTS[0], *RESPONSES[0]]])
        with torch.no_grad():
            logits = theirs.eval()(ids).logits[0]
            if not merged:
                torch.testing.assert_close(auto.eval()(ids).logits[0], logits)
        theirs = logits.log_softmax(-1)[2:6].gather(1, ids[0, 3:, None])[:, 0]
        torch.testing.assert_close(theirs, expected[:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_saved_reward_model(base, tokenizer, tmp_path, merged):
    """Its head is not in the model that it began with."""
    model = adapted(ScalarModel.load(base), base)
    model.bias = 0.5
    expected = scores(model)
    model.save(tmp_path / "saved", tokenizer, merged=merged)
    torch.testing.assert_close(scores(ScalarModel.load(tmp_path / "saved").eval()), expected, atol=1e-5, rtol=1e-5)
    if merged:
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    else:
        theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "saved").get_base_model()
    ids = torch.tensor([[*PROMPTS[0], *RESPONSES[0]]])
    with torch.no_grad():
        score = theirs.eval().score(theirs.base_model(ids).last_hidden_state)[0, -1, 0]
    torch.testing.assert_close(score + 0.5, expected[0], atol=1e-5, rtol=1e-5)


def test_three_stages(sft_config, reward_config, ppo_config, base, data, monkeypatch):
    """SFT, reward model and PPO, each an adapter but the first, on two sets of weights in PPO."""
    start = load_file(f"{base}/model.safetensors")
    tuned = sft.train(sft_config(lora={"rank": 4, "dropout": 0.1, "merge": True}, residual_dropout=0.0, **RATE))
    losses = [record["loss"] for record in metrics(tuned.parent)]
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, tensor in load_file(tuned / "model.safetensors").items() if not tensor.equal(start[name])}
    assert changed == {name for name in start if ".h." in name and name.endswith("weight") and "ln" not in name}

    rewards = reward.train(
        reward_config(model=str(tuned), demonstrations=data.demonstrations, lora={"rank": 4}, **RATE)
    )
    assert metrics(rewards.parent)[-1]["accuracy"] > 0.8
    sizes = {path.name: path.stat().st_size for path in rewards.iterdir()}
    assert sizes["adapter_model.safetensors"] < 0.5 * Path(f"{base}/model.safetensors").stat().st_size

    held, place = [], training.place
    monkeypatch.setattr(training, "place", lambda model, *rest: held.append(model) or place(model, *rest))
    path = ppo.train(
        ppo_config(
            policy=str(tuned), reward_model=str(rewards), lora={"rank": 4}, checkpoint_every=1, gamma_ptx=0.5, **RATE
        )
    )
    assert [type(model) for model in held] == [LanguageModel, ScalarModel]
    first, *_, last = metrics(path.parent)
    assert abs(first["kl"]) < 1e-5 < abs(last["kl"])
    assert first["ratio_max_deviation"] < 1e-3
    assert ScalarModel.load(path.parent / "value").bias == ScalarModel.load(rewards).bias != 0
    policy, tuned = (LanguageModel.load(each).eval() for each in (path, tuned))
    assert (logprobs(policy) - logprobs(tuned)).abs().max() > 1e-3


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_stopped_and_resumed(stage, sft_config, ppo_config, monkeypatch):
    make, module = {"sft": (sft_config, sft), "ppo": (ppo_config, ppo)}[stage]
    options = {"lora": {"rank": 4, "merge": False}, "checkpoint_every": 2, **RATE}
    whole, stopped = make("whole", **options), make("stopped", **options)
    expected = module.train(whole)
    stop_at_step_3(module, stopped, monkeypatch)
    path = module.train(stopped, resume=True)
    name = "adapter_model.safetensors"
    assert (path / name).read_bytes() == (expected / name).read_bytes()


def test_frozen_weights_in_bfloat16(ppo_config):
    """The weights that are not trained are rounded, and what is trained is not."""
    config = ppo_config(lora={"rank": 4}, frozen_dtype="bfloat16", ema_decay=0.0, episodes=32, **RATE)
    path = ppo.train(config)
    assert {tensor.dtype for tensor in load_file(path / "adapter_model.safetensors").values()} == {torch.float32}
    first, last = metrics(path.parent)
    assert first["ratio_max_deviation"] < 0.2
    assert last["kl"] != first["kl"]


def test_alpha_is_the_factor_times_the_rank(base):
    changes = []
    for alpha in (None, 8.0, 16.0):
        model = adapted(LanguageModel.load(base), base, alpha=alpha)
        layer = model.blocks[0].attn.c_attn
        changes.append(layer.get_delta_weight("default"))
    assert torch.equal(changes[0], changes[1])
    torch.testing.assert_close(changes[2], 2 * changes[1])


@pytest.mark.parametrize(
    ("stage", "lora", "says"),
    [
        ("sft", ["--lora.rank", 4, "--lora.target_modules", "nowhere"], "lora.target_modules: "),
        ("sft", ["--lora.rank", 4, "--lora.target_modules", "[lm_head]"], "lora.target_modules: "),
        ("sft", ["--lora.rank", -1], "rank: is -1, must be at least 0"),
        ("sft", ["--frozen_dtype", "bfloat16"], "frozen_dtype: is 'bfloat16', must be float32 without lora.rank"),
    ],
)
def test_settings_that_do_not_fit(stage, lora, says, rlhf, base, data, tmp_path):
    status, error = rlhf(stage, "--model", base, "--data", data.demonstrations, *lora, "--output_dir", tmp_path / "run")
    assert status == 2
    assert says in only_line(error)


def test_an_adapter_on_an_adapter(base, tokenizer, tmp_path):
    """It could not be loaded by others, so it is saved as a whole model."""
    adapted(LanguageModel.load(base), base).save(tmp_path / "first", tokenizer, merged=False)
    model = LanguageModel.load(tmp_path / "first")
    with pytest.raises(ConfigError, match=r"lora\.merge: is false, but .*first is an adapter itself"):
        add_adapter(model, LoRA(rank=2), tmp_path / "first", merged=False)
    add_adapter(model, LoRA(rank=2), tmp_path / "first", merged=True)


def test_adapters_of_others(base, tokenizer, tmp_path):
    """They have no configuration of the model, no tokenizer, and may lack what a reward model needs."""
    model = adapted(LanguageModel.load(base), base)
    expected = logprobs(model)
    model.save(tmp_path / "ours", tokenizer, merged=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs" / name).write_bytes((tmp_path / "ours" / name).read_bytes())
    torch.testing.assert_close(logprobs(LanguageModel.load(tmp_path / "theirs").eval()), expected)
    assert load_tokenizer(tmp_path / "theirs").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ModelError, match=r"theirs: .* is not a reward model"):
        check_reward_config(tmp_path / "theirs")
    (tmp_path / "theirs" / "adapter_model.safetensors").write_bytes(b"spoilt")
    with pytest.raises(ModelError, match="theirs: the adapter could not be loaded"):
        LanguageModel.load(tmp_path / "theirs")


def test_a_reward_model_that_begins_with_an_adapter(base, tokenizer, tmp_path):
    """The adapter of a language model has no head: a reward model gets a new one of zeros, on the adapted states."""
    model = adapted(LanguageModel.load(base), base)
    model.save(tmp_path / "first", tokenizer, merged=False)
    scalar = ScalarModel.load(tmp_path / "first").eval()
    assert not scalar.head.weight.any()
    batch = model.lay_out(groups_of_one(PROMPTS, RESPONSES))
    with torch.no_grad():
        torch.testing.assert_close(
            scalar.hidden(batch, batch.last), model.hidden(batch, batch.last), atol=1e-5, rtol=1e-5
        )


def test_an_adapter_of_another_model(base, llama, tokenizer, tmp_path):
    adapted(LanguageModel.load(base), base).save(tmp_path / "first", tokenizer, merged=False)
    path = tmp_path / "first/adapter_config.json"
    path.write_text(path.read_text().replace(base, llama))
    (tmp_path / "first/config.json").unlink()
    with pytest.raises(ModelError, match="first: the adapter"):
        LanguageModel.load(tmp_path / "first")
