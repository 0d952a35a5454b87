"""TRL's trainers give the same losses and weights with our ops in them, and ours are the ones that ran."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
utils = pytest.importorskip("trl.trainer.utils")

from rlhf_kernels.integrations import patching  # noqa: E402
from rlhf_kernels.integrations.trl import patch, unpatch  # noqa: E402

V = 40
CHUNKED = "trl.kernels.chunked_logprob.ChunkedLogProbFunction.apply"
has_kernels = pytest.mark.skipif(not hasattr(trl, "kernels") and "1.9" in trl.__version__, reason="since TRL 1.16")


@pytest.fixture
def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(V - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny(kind=LlamaForCausalLM, **options):
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def rows(count=8):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        some = torch.randint(0, V - 3, (12,), generator=generator).tolist()
        words = [f"w{i}" for i in some]
        yield {
            "prompt": " ".join(words[:4]),
            "chosen": " " + " ".join(words[4:9]),
            "rejected": " " + " ".join(words[9:]),
        }


def two_steps(trainer):
    """What TRL logs of them but for times, and the final weights."""
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    figures = {
        f"{i} {name}": x for i, entry in enumerate(logged) for name, x in entry.items() if not name.endswith("time")
    }
    return figures, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def settings(kind, tmp_path, **options):
    return kind(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, per_device_train_batch_size=4, report_to="none",
        save_strategy="no", learning_rate=1e-2, use_cpu=True, bf16=False, seed=3, disable_tqdm=True, **options,
    )  # fmt: skip


def length_reward(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def trainer_of(name, tokenizer, tmp_path):
    data = datasets.Dataset.from_list(list(rows()))
    if name in ("GRPO", "RLOO"):
        config, trainer = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
        args = settings(config, tmp_path, num_generations=4, max_completion_length=6, beta=0.1)
        tiny().save_pretrained(tmp_path / "model")  # TRL loads the reference from where the model came from
        return trainer(
            model=LlamaForCausalLM.from_pretrained(tmp_path / "model"), args=args, reward_funcs=length_reward,
            processing_class=tokenizer, train_dataset=data.select_columns(["prompt"]),
        )  # fmt: skip
    if name == "DPO":
        return trl.DPOTrainer(
            model=tiny(), ref_model=tiny(), args=settings(trl.DPOConfig, tmp_path, max_length=32),
            processing_class=tokenizer, train_dataset=data,
        )  # fmt: skip
    if name == "SFT":
        texts = datasets.Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in rows()])
        return trl.SFTTrainer(
            model=tiny(), args=settings(trl.SFTConfig, tmp_path, max_length=32), processing_class=tokenizer,
            train_dataset=texts,
        )  # fmt: skip
    if name.startswith("Reward"):
        if name == "Reward with margins":
            data = data.add_column("margin", [0.25 * i for i in range(len(data))])
        return trl.RewardTrainer(
            model=tiny(LlamaForSequenceClassification, num_labels=1), processing_class=tokenizer, train_dataset=data,
            args=settings(trl.RewardConfig, tmp_path, max_length=32, disable_dropout=True),
        )  # fmt: skip
    raise ValueError(name)


@pytest.mark.parametrize("name", ["Reward", "Reward with margins"])
def test_two_steps_of_the_reward_model_are_the_same(name, tokenizer, tmp_path):
    figures, weights = two_steps(trainer_of(name, tokenizer, tmp_path / "theirs"))
    with patch() as patched:
        ours, ours_weights = two_steps(trainer_of(name, tokenizer, tmp_path / "ours"))
        assert patched.calls == {"trl.trainer.reward_trainer.RewardTrainer.compute_loss": 2}, str(patched)
    assert ours == pytest.approx(figures, rel=1e-4, abs=1e-5)
    for key, want in weights.items():
        assert (ours_weights[key] - want).abs().mean() < 1e-4, key


@has_kernels
@pytest.mark.parametrize("name", ["GRPO", "RLOO", "DPO", "SFT"])
def test_two_steps_are_the_same(name, tokenizer, tmp_path):
    figures, weights = two_steps(trainer_of(name, tokenizer, tmp_path / "theirs"))
    with patch() as patched:
        ours, ours_weights = two_steps(trainer_of(name, tokenizer, tmp_path / "ours"))
        # In each step: the policy, the reference, and RLOO's log-probs of the rollout.
        assert patched.calls[CHUNKED] == 2 * {"SFT": 1, "DPO": 2, "GRPO": 2, "RLOO": 3}[name], str(patched)
    assert ours == pytest.approx(figures, rel=1e-4, abs=1e-5)
    for key, want in weights.items():
        # Adam's first steps are as large for a gradient of 1e-9 as for one of 1, so single weights may differ.
        assert (ours_weights[key] - want).abs().mean() < 1e-4, key


@pytest.mark.skipif("1.9" not in trl.__version__, reason="PPO was in TRL up to 1.9")
def test_two_steps_of_ppo_are_the_same(tokenizer, tmp_path):
    ppo = pytest.importorskip("trl.experimental.ppo")
    prompts = datasets.Dataset.from_dict({"input_ids": [tokenizer(row["prompt"]).input_ids for row in rows(16)]})

    def run(name):
        scalars = [tiny(LlamaForSequenceClassification, num_labels=1) for _ in range(2)]
        config = ppo.PPOConfig(
            output_dir=str(tmp_path / name), report_to="none", save_strategy="no", use_cpu=True, bf16=False, seed=3,
            per_device_train_batch_size=4, num_mini_batches=1, num_ppo_epochs=2, total_episodes=8, response_length=6,
            num_sample_generations=0, learning_rate=1e-2, disable_tqdm=True, local_rollout_forward_batch_size=4,
        )  # fmt: skip
        trainer = ppo.PPOTrainer(
            args=config, processing_class=tokenizer, model=tiny(), ref_model=tiny(), reward_model=scalars[0],
            value_model=scalars[1], train_dataset=prompts, eval_dataset=prompts,
        )  # fmt: skip
        trainer.train()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    weights = run("theirs")
    with patch() as patched:
        ours = run("ours")
        assert patched.calls["trl.trainer.utils.selective_log_softmax"] >= 4, str(patched)
    for key, want in weights.items():
        assert (ours[key] - want).abs().mean() < 1e-4, key


def test_functions_are_the_same_function():
    logits = (3 * torch.randn(3, 5, V)).requires_grad_()
    index, mask = torch.randint(0, V, (3, 5)), torch.rand(3, 5) < 0.6
    options = [{}] if "temperature" not in inspect.signature(utils.selective_log_softmax).parameters else [
        {}, {"temperature": 0.7}, {"temperature": 0.7, "row_mask": mask}
    ]  # fmt: skip

    def results(dtype, exact=False):
        found = []
        for some in options:
            x = logits.to(dtype).double() if exact else logits.to(dtype)
            y = utils.selective_log_softmax(x, index, **some)
            found += [y, torch.autograd.grad(y.float().sin().sum(), logits)[0]]
        y = utils.entropy_from_logits(logits.to(dtype).double() if exact else logits.to(dtype))
        found += [y, torch.autograd.grad(y.float().sin().sum(), logits)[0]]
        found.append(utils.selective_log_softmax(logits.detach().to(dtype), torch.stack([index, index + 0], -1)))
        return found

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        theirs, exact = results(dtype), results(dtype, exact=True)
        with patch() as patched:
            got = results(dtype)
            assert patched.calls == {
                "trl.trainer.utils.selective_log_softmax": len(options), "trl.trainer.utils.entropy_from_logits": 1
            }  # fmt: skip
        for a, b, truth in zip(got, theirs, exact, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert (a - truth).norm() <= 1.1 * (b - truth).norm() + 1e-7 * truth.norm()


def test_everything_is_put_back():
    before = {name: getattr(utils, name) for name in ("selective_log_softmax", "entropy_from_logits")}
    first = patch()
    with patch() as second:
        assert second.replaced is first.replaced
    assert first.replaced[0].in_place, "the end of a block inside puts nothing back"
    assert all(getattr(utils, name) is not function for name, function in before.items())
    text = str(first)
    assert "trl.trainer.utils.selective_log_softmax -> selective_log_softmax, 0 calls" in text
    assert "left alone" in text
    unpatch()
    with patch() as third:
        utils.entropy_from_logits(torch.randn(3, V))
    assert sum(third.calls.values()) == 1
    assert "entropy_from_logits -> selective_log_softmax_and_entropy, 1 calls" in str(third)
    assert all(getattr(utils, name) is function for name, function in before.items())


def test_a_function_that_changed_is_refused(monkeypatch):
    def selective_log_softmax(logits, index):
        return math.nan

    before = utils.entropy_from_logits
    monkeypatch.setattr(utils, "selective_log_softmax", selective_log_softmax)
    with pytest.raises(
        patching.ChangedFunctionError, match=r"selective_log_softmax .* the releases tried: 1\.16\.0, 1\.9"
    ):
        patch()
    assert utils.entropy_from_logits is before


@has_kernels
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 2.0}, {"scale": 3.0}], ids=str)
def test_statistics_of_the_logits(options):
    from trl.kernels import ChunkedLogProbFunction

    hidden, weight, bias = (torch.randn(*shape) for shape in ((30, 8), (V, 8), (V,)))
    targets = torch.where(torch.arange(30) % 2 == 0, (hidden @ weight.T + bias).argmax(-1), torch.arange(30))
    outputs = ("entropy", "is_top1") if "softcap" in options else ("entropy", "mean_logits", "is_top1")
    arguments = hidden, weight, bias, targets, options.get("temperature", 1.0), 16
    rest = {"softcap": options.get("softcap"), "scale": options.get("scale", 1.0)}

    def run():
        return ChunkedLogProbFunction.apply(*arguments, *rest.values(), outputs)

    theirs = run()
    with patch() as patched:
        ours = run()
        assert patched.calls == {CHUNKED: 1}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(x.dtype in (torch.float32, torch.bool) for x in run() if x is not None)
    assert theirs[4][::2].all()
    assert not theirs[4].all()
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@has_kernels
def test_arguments_may_be_positional():
    logits, index, mask = torch.randn(2, 3, V), torch.randint(0, V, (2, 3)), torch.rand(2, 3) < 0.5
    want = utils.selective_log_softmax_and_entropy(logits, index, False, 0.7, mask)
    with patch() as patched:
        got = utils.selective_log_softmax_and_entropy(logits, index, False, 0.7, mask)
        assert sum(patched.calls.values()) == 1
    torch.testing.assert_close(got, want)
