"""Supervised fine-tuning: its loss against the Hugging Face model's own, its mix, its dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tools import metrics, write_jsonl

from rlhf import sft
from rlhf.config import Adam, cosine_to_tenth
from rlhf.data import Example, Limits, read_demonstrations, tokenize_demonstrations
from rlhf.loading import load_tokenizer
from rlhf.models import LanguageModel
from rlhf.settings import ConfigError
from rlhf.training import batch_indices, hold_out

LIMITS = Limits(max_prompt_tokens=1024, max_response_tokens=1024, context_length=64)


@pytest.fixture
def examples(data, base):
    return tokenize_demonstrations(read_demonstrations([data.demonstrations]), load_tokenizer(base), LIMITS)


def their_loss(model, examples):
    """transformers' cross entropy with the prompt's labels ignored: one sequence at a time, summed over tokens."""
    total = 0.0
    for example in examples:
        ids = torch.tensor([example.prompt_ids + example.completion_ids])
        labels = ids.clone()
        labels[0, : len(example.prompt_ids)] = -100
        total = total + model(input_ids=ids, labels=labels).loss * len(example.completion_ids)
    return total / sum(len(example.completion_ids) for example in examples)


@pytest.mark.parametrize("tokens_per_forward", [16384, 25, 1])
def test_loss_and_gradient_are_transformers_own(sft_config, open_run, base, examples, tokens_per_forward):
    """Both are the cross entropy on the completion's tokens, although ours is packed, in parts and without logits."""
    run = open_run("sft", sft_config(tokens_per_forward=tokens_per_forward))
    model, other = LanguageModel.load(base).eval(), LanguageModel.load(base).eval()
    ours = sft.language_model_step(run, model, examples[:12])
    theirs = their_loss(other.model, examples[:12])
    theirs.backward()
    assert ours == pytest.approx(theirs.item(), abs=1e-5)
    assert sft.mean_loss(run, model, examples[:12]) == pytest.approx(theirs.item(), abs=1e-5)
    for (name, first), second in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_weight_scales_the_gradient_alone(sft_config, open_run, base, examples):
    run = open_run("sft", sft_config())
    model, other = LanguageModel.load(base).eval(), LanguageModel.load(base).eval()
    assert sft.language_model_step(run, model, examples[:4], weight=27.8) == sft.language_model_step(
        run, other, examples[:4]
    )
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first.grad, 27.8 * second.grad, atol=1e-4, rtol=1e-4)


def test_loss_falls(sft_config):
    config = sft_config(epochs=8, held_out_fraction=0.2, residual_dropout=0.1)
    path = sft.train(config)
    records = metrics(Path(config.output_dir))
    assert len(records) == 8 * 32 // 8
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert len(held_out) == 8  # one per epoch
    page = (path.parent / "report.md").read_text()
    assert "held-out loss before" in page
    assert "| demonstrations | 32 |" in page


def test_learning_rate_decays_to_a_tenth(sft_config):
    config = sft_config(epochs=2)
    sft.train(config)
    rates = [record["learning_rate"] for record in metrics(Path(config.output_dir))]
    assert rates == pytest.approx([config.adam.learning_rate * cosine_to_tenth(i, 10) for i in range(10)])
    assert rates[0] == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(3e-4)
    assert sorted(rates, reverse=True) == rates
    assert cosine_to_tenth(50, 101) == pytest.approx(0.55)
    assert cosine_to_tenth(0, 1) == 1


@pytest.fixture
def seen(monkeypatch):
    """The batches that a run trains on."""
    batches, step = [], sft.language_model_step

    def record(run, model, examples, weight=1.0):
        batches.append(list(examples))
        return step(run, model, examples, weight)

    monkeypatch.setattr(sft, "language_model_step", record)
    return batches


def test_pretraining_fraction_is_mixed_in(sft_config, seen, data, examples):
    config = sft_config(epochs=2, batch_size=8, pretraining_data=data.texts, pretraining_fraction=0.25)
    sft.train(config)
    assert [len(batch) for batch in seen[:-1]] == [8] * (len(seen) - 1)
    known = {tuple(example.prompt_ids + example.completion_ids) for example in examples}
    for batch in seen[:-1]:
        mixed = [e for e in batch if tuple(e.prompt_ids + e.completion_ids) not in known]
        assert len(mixed) == 2
        assert all(len(e.prompt_ids) == 1 and len(e.completion_ids) == 15 for e in mixed)  # chunks of 16
    demonstrations = [tuple(e.prompt_ids + e.completion_ids) for batch in seen for e in batch]
    assert sum(ids in known for ids in demonstrations) == 2 * 40  # every demonstration in every epoch


def test_a_small_fraction_is_one_chunk_a_batch(sft_config, seen, data, examples):
    """8 · 0.05 rounds to none, which would leave the setting without effect."""
    sft.train(sft_config(epochs=1, batch_size=8, pretraining_data=data.texts, pretraining_fraction=0.05))
    known = [example.prompt_ids + example.completion_ids for example in examples]
    mixed = [[e for e in batch if e.prompt_ids + e.completion_ids not in known] for batch in seen]
    assert [len(chunks) for chunks in mixed] == [1] * len(seen)


def test_every_demonstration_once_an_epoch(sft_config, seen, examples):
    sft.train(sft_config(epochs=3, batch_size=12))
    assert [len(batch) for batch in seen] == [12] * 10
    order = [tuple(e.prompt_ids + e.completion_ids) for batch in seen for e in batch]
    epochs = [order[i : i + 40] for i in (0, 40, 80)]
    everything = sorted(tuple(e.prompt_ids + e.completion_ids) for e in examples)
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1]


def test_batch_indices_are_a_function_of_their_arguments():
    first = [batch_indices(10, 4, step, seed=1) for step in range(10)]
    assert first == [batch_indices(10, 4, step, seed=1) for step in range(10)]
    assert first != [batch_indices(10, 4, step, seed=2) for step in range(10)]
    flat = [i for batch in first for i in batch]
    assert [sorted(flat[i : i + 10]) for i in range(0, 40, 10)] == [list(range(10))] * 4
    assert [len(batch_indices(10, 4, step, seed=1, epochs=1)) for step in range(3)] == [4, 4, 2]
    assert len(batch_indices(3, 8, 0, seed=1)) == 8  # a batch larger than the data goes round


def test_hold_out():
    training, held_out = hold_out(20, 0.25, seed=0)
    assert len(held_out) == 5
    assert sorted(training + held_out) == list(range(20))
    assert hold_out(20, 0.25, seed=0) == (training, held_out)
    assert hold_out(20, 0.25, seed=1)[1] != held_out
    assert hold_out(20, 0.0, seed=0) == (list(range(20)), [])
    assert len(hold_out(20, 0.001, seed=0)[1]) == 1
    with pytest.raises(ConfigError, match=r"held_out_fraction: 0\.9 of 2 records leaves none to train on"):
        hold_out(2, 0.9, seed=0)


def test_held_out_demonstrations_are_not_trained_on(sft_config, seen, examples):
    sft.train(sft_config(epochs=2, held_out_fraction=0.25))
    _, held_out = hold_out(40, 0.25, 0)
    trained = {tuple(e.prompt_ids + e.completion_ids) for batch in seen for e in batch}
    assert len(trained) == 30
    assert not trained & {tuple(examples[i].prompt_ids + examples[i].completion_ids) for i in held_out}


def test_dropout_is_residual_alone(base):
    model = LanguageModel.load(base, residual_dropout=0.2).model
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {name for name, rate in rates.items() if rate} == {
        f"transformer.h.{layer}.{part}" for layer in (0, 1) for part in ("attn.resid_dropout", "mlp.dropout")
    }
    assert set(rates.values()) == {0.0, 0.2}
    assert (model.config.resid_pdrop, model.config.attn_pdrop, model.config.embd_pdrop) == (0.2, 0.0, 0.0)


def test_dropout_only_in_training(sft_config, open_run, base, examples):
    run = open_run("sft", sft_config())
    model = LanguageModel.load(base, residual_dropout=0.5)
    model.train()
    batch = model.lay_out([example.group for example in examples[:4]])
    draws = [sft.token_loss(run, model, batch).item() for _ in range(2)]
    assert draws[0] != draws[1]
    assert sft.mean_loss(run, model, examples[:4]) == sft.mean_loss(run, model, examples[:4])
    assert model.training  # the mode is restored after measuring
    model.eval()
    sft.mean_loss(run, model, examples[:4])
    assert not model.training
    plain = LanguageModel.load(base).train()
    assert sft.token_loss(run, plain, batch).item() == sft.token_loss(run, plain, batch).item()


def test_dropout_reaches_training(sft_config):
    paths = [sft.train(sft_config(f"dropout-{rate}", epochs=1, residual_dropout=rate)) for rate in (0.0, 0.5)]
    first, second = (load_file(path / "model.safetensors") for path in paths)
    assert any((first[name] != second[name]).any() for name in first)


def test_seed_decides_everything(sft_config):
    paths = [sft.train(sft_config(name, epochs=1, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    a, b, c = ((path / "model.safetensors").read_bytes() for path in paths)
    assert a == b
    assert a != c


def test_gradient_norm_is_clipped(sft_config, open_run, base, examples):
    run = open_run("sft", sft_config())
    model = LanguageModel.load(base)
    adam = Adam(1.0, max_grad_norm=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sft.language_model_step(run, model, examples[:4])
    norm = sft.optimizer_step(run, model, optimizer, adam, 1.0)
    assert norm > 0.1  # the norm before clipping
    moved = [(p - q).square().sum().item() for p, q in zip(model.parameters(), before, strict=True)]
    assert sum(moved) ** 0.5 == pytest.approx(1e-3, rel=1e-2)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_long_answers_are_cut(sft_config, seen, tmp_path):
    path = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "w01", "completion": "w02 w03 w04 w05 w06"}] * 8)
    config = sft_config(epochs=1)
    config.data, config.lengths.max_response_tokens = path, 3
    sft.train(config)
    assert {len(example.completion_ids) for batch in seen for example in batch} == {3}


def test_pretraining_chunks(tokenizer):
    """Documents end with EOS and are cut into chunks. The first token of a chunk is read, but not predicted."""
    chunks = sft.pretraining_examples(["w00 w01 w02", "w03", "w04 w05 w06"], tokenizer, 4)
    eos, first = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("w00")
    assert chunks == [
        Example([first], [first + 1, first + 2, eos]),
        Example([first + 3], [eos, first + 4, first + 5]),
    ]


def test_keep_every(sft_config):
    """Three epochs of five steps; the last that is kept is the model."""
    path = sft.train(sft_config(keep_every=5))
    kept = sorted(path.parent.glob("step-*"))
    assert [directory.name for directory in kept] == ["step-000005", "step-000010", "step-000015"]
    weights = [(directory / "model.safetensors").read_bytes() for directory in (*kept, path)]
    assert weights[2] == weights[3]
    assert len(set(weights)) == 3
