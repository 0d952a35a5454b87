"""The reward model: the paper's loss, its bias, and the scores that other tools read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tools import metrics, write_jsonl
from transformers import AutoModelForSequenceClassification

from rlhf import reward
from rlhf.batch import Group, groups_of_one, lay_out, split
from rlhf.config import Adam
from rlhf.data import (
    Limits,
    RankedExample,
    read_comparisons,
    read_demonstrations,
    tokenize_comparisons,
    tokenize_demonstrations,
)
from rlhf.loading import load_tokenizer
from rlhf.models import Backbone, ScalarModel

LIMITS = Limits(max_prompt_tokens=1024, max_response_tokens=1024, context_length=64)


class Scores(torch.nn.Module):
    """A reward model that gives scores known in advance: token n of the vocabulary scores ``table[n]``."""

    lay_out = staticmethod(lay_out)
    parts = staticmethod(lambda groups, tokens: list(split(groups, tokens)))
    batches = Backbone.batches

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table))

    def forward(self, batch, positions):
        return self.table[batch.input_ids.flatten()[positions]]


def comparison(*ranks, prompt=(0,)):
    """Completion number i is the single token i."""
    return RankedExample(list(prompt), [[i] for i in range(len(ranks))], list(ranks))


@pytest.fixture
def run(reward_config, open_run):
    return open_run("reward", reward_config())


@pytest.mark.parametrize(("ranks", "loss", "accuracy"), [((1, 2), 0.2014, 1.0), ((2, 1), 1.7014, 0.0)])
def test_worked_example(run, ranks, loss, accuracy):
    """Scores 2.0 and 0.5: −log σ(1.5) = 0.20 when the first is preferred, −log σ(−1.5) = 1.70 when the second is."""
    got = reward.ranking_step(run, Scores([2.0, 0.5]), [comparison(*ranks)], prompts=1)
    assert got == pytest.approx((loss, accuracy), abs=5e-5)


def test_worked_example_s_gradient(run):
    """σ(r_w − r_l) − 1 for the winner."""
    model = Scores([2.0, 0.5])
    reward.ranking_step(run, model, [comparison(1, 2)], prompts=1)
    slope = 1 - 1 / (1 + math.exp(-1.5))
    assert model.table.grad.tolist() == pytest.approx([-slope, slope])


def test_four_completions_are_six_pairs(run):
    assert reward.pair_count(comparison(1, 2, 3, 4)) == 6
    assert [reward.pair_count(comparison(*range(k))) for k in range(4, 10)] == [6, 10, 15, 21, 28, 36]
    assert reward.pair_count(comparison(1, 1, 2, 2)) == 4
    assert reward.pair_count(comparison(1, 1)) == 0


def test_loss_of_a_prompt_is_the_mean_over_its_pairs(run):
    """The loss of a batch is the mean over its prompts. The gradients are those of that mean."""
    table = [0.3, -1.2, 2.0, 0.7, -0.4]
    batch = [comparison(2, 1, 4, 3), comparison(1, 2, 2), comparison(5, 4, 3, 2, 1)]
    model = Scores(table)
    got, _ = reward.ranking_step(run, model, batch, prompts=3)

    scores = torch.tensor(table, requires_grad=True)
    means = []
    for example in batch:
        ranked = list(enumerate(example.ranks))
        pairs = [(w, loser) for w, a in ranked for loser, b in ranked if a < b]
        assert len(pairs) == reward.pair_count(example)
        means.append(sum(-torch.nn.functional.logsigmoid(scores[w] - scores[loser]) for w, loser in pairs) / len(pairs))
    expected = sum(means) / len(batch)
    expected.backward()
    assert got == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(model.table.grad, scores.grad)


def test_tokens_per_forward_changes_nothing(reward_config, base, data, open_run):
    """Gradients of a real model, in one pass and in many."""
    examples = tokenize_comparisons(read_comparisons([data.comparisons]), load_tokenizer(base), LIMITS)[:8]
    results = []
    for tokens in (16384, 30):
        model = ScalarModel.load(base).eval()
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        run = open_run("reward", reward_config(f"run-{tokens}", tokens_per_forward=tokens))
        figures = reward.ranking_step(run, model, examples, prompts=8)
        results.append((figures, [p.grad for p in model.parameters() if p.grad is not None]))
    (figures, gradients), (other_figures, other_gradients) = results
    assert len(model.parts([example.group for example in examples], 30)) > 4
    assert figures == pytest.approx(other_figures, abs=1e-5)
    for first, second in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_ranking_accuracy():
    """The share of pairs in the labeller's order, first within a prompt, then over prompts; equal scores are half."""
    model = Scores([3.0, 2.0, 1.0, 0.0])
    assert reward.ranking_accuracy(model, [comparison(1, 2, 3, 4)], 100) == 1
    assert reward.ranking_accuracy(model, [comparison(4, 3, 2, 1)], 100) == 0
    batch = [comparison(2, 1), comparison(1, 3, 2)]  # 0 of 1 and 2 of 3
    assert reward.ranking_accuracy(model, batch, 100) == pytest.approx((0 + 2 / 3) / 2)
    assert reward.ranking_accuracy(model, batch, 1) == pytest.approx((0 + 2 / 3) / 2)


def test_ranks_are_where_the_scores_are(run, monkeypatch):
    devices, loss = [], torch.tensor(1.0, requires_grad=True)

    def keep(scores, ranks, offsets):
        devices.append((ranks.device.type, offsets.device.type))
        return loss, torch.tensor(0.5)

    monkeypatch.setattr(reward, "pairwise_ranking_loss", keep)
    model = Scores([2.0, 0.5]).to("meta")
    reward.ranking_step(run, model, [comparison(1, 2)], prompts=1)
    reward.ranking_accuracy(model, [comparison(1, 2)], 100)
    assert devices == [("meta", "meta")] * 2


def test_one_forward_pass_per_completion(run):
    """There is not one pass for each pair."""
    seen = []

    class Counting(Scores):
        def forward(self, batch, positions):
            seen.append(len(positions))
            return super().forward(batch, positions)

    reward.ranking_step(run, Counting([0.0] * 9), [comparison(*range(9))], prompts=1)
    assert seen == [9]


def test_score_is_read_at_the_last_token(base, tokenizer):
    """Packed scores are those of each sequence alone, by the Hugging Face model's own code."""
    torch.manual_seed(0)
    model = ScalarModel.load(base).eval()
    torch.nn.init.normal_(model.head.weight)
    model.bias = -0.75
    prompts, responses = [[5, 6, 7], [8], [9, 10]], [[11, 1], [12, 13, 14, 1], [15]]
    ours = reward.score(model, groups_of_one(prompts, responses), 1000)
    model.model.config.pad_token_id = tokenizer.pad_token_id
    for score, prompt, response in zip(ours, prompts, responses, strict=True):
        with torch.no_grad():
            theirs = model.model(input_ids=torch.tensor([prompt + response])).logits[0, 0] - 0.75
        torch.testing.assert_close(score, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, reward.score(model, groups_of_one(prompts, responses), 1), atol=1e-5, rtol=1e-5)


def test_new_head_starts_at_zero(base):
    model = ScalarModel.load(base)
    assert reward.score(model, [Group([5], [[6]])], 100).tolist() == [0]
    assert model.head.weight.shape == (1, 32)


def test_trained_and_saved(reward_config, data):
    """It learns, demonstrations score 0 on average, and plain transformers reads the same scores without the bias."""
    config = reward_config(epochs=6, demonstrations=data.demonstrations, held_out_fraction=0.2)
    path = reward.train(config)
    records = metrics(Path(config.output_dir))
    assert sum(r["loss"] for r in records[-3:]) / 3 < 0.75 * records[0]["loss"]
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # a head of zeros is indifferent
    assert records[-1]["learning_rate"] == pytest.approx(0.1 * config.adam.learning_rate)
    assert sum(r["accuracy"] for r in records[-3:]) / 3 > 0.75
    page = (path.parent / "report.md").read_text()
    assert "held-out accuracy" in page
    assert "| held-out prompts | 5 |" in page

    tokenizer = load_tokenizer(str(path))
    model = ScalarModel.load(str(path)).eval()
    examples = tokenize_demonstrations(read_demonstrations([data.demonstrations]), tokenizer, LIMITS)
    prompts, responses = [e.prompt_ids for e in examples], [e.completion_ids for e in examples]
    scores = reward.score(model, groups_of_one(prompts, responses), 16384)
    assert abs(scores.mean().item()) < 1e-5
    assert scores.std().item() > 1e-3
    assert model.bias != 0
    assert f"{model.bias:.4g}" in page

    config = json.loads((path / "config.json").read_text())
    assert config["reward_bias"] == model.bias
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert plain.config.num_labels == 1
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    padded = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    assert padded.attention_mask.min() == 0
    with torch.no_grad():
        logits = plain(**padded).logits
    assert logits.shape == (len(rows), 1)
    torch.testing.assert_close(logits[:, 0] + plain.config.reward_bias, scores, atol=1e-5, rtol=1e-4)


def test_without_demonstrations_no_bias(reward_config):
    model = ScalarModel.load(str(reward.train(reward_config(epochs=1))))
    assert model.bias == 0


def test_bias_survives_further_training(reward_config, reward_model):
    """Training on from a reward model keeps its head and its bias."""
    path = reward.train(reward_config(model=reward_model, epochs=1, adam=Adam(1e-9)))
    first, second = ScalarModel.load(reward_model), ScalarModel.load(str(path))
    torch.testing.assert_close(first.head.weight, second.head.weight)
    assert second.bias == first.bias == 0.25


def test_a_pair_is_a_comparison_of_two(reward_config, tmp_path):
    """{"chosen", "rejected"} trains to the same weights as the same pairs with ranks."""
    pairs = [("w01 w02", "w03", "w20 w09"), ("w11", "w12 w13", "w01"), ("w30", "w31", "w07")]
    chosen = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs]
    ranked = [{"prompt": p, "completions": [b, a], "ranks": [2, 1]} for p, a, b in pairs]
    paths = [
        reward.train(reward_config(name, data=write_jsonl(tmp_path / f"{name}.jsonl", records)))
        for name, records in (("chosen", chosen), ("ranked", ranked))
    ]
    first, second = (ScalarModel.load(str(path)).state_dict() for path in paths)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-4, rtol=1e-3)


def test_prompts_all_tied_are_left_out(reward_config, tmp_path, caplog):
    records = [{"prompt": "w01", "completions": ["w02", "w03"], "ranks": ranks} for ranks in ([1, 2], [1, 1], [2, 1])]
    config = reward_config(data=write_jsonl(tmp_path / "ties.jsonl", records), epochs=1)
    reward.train(config)
    assert [record["pairs"] for record in metrics(Path(config.output_dir))] == [2]


def test_short_last_batch_counts_in_full(reward_config):
    """24 prompts, two epochs, batches of 10: the last batch has 8 prompts, and its mean is over those 8."""
    config = reward_config(batch_size=10, epochs=2)
    reward.train(config)
    assert len(metrics(Path(config.output_dir))) == 5
