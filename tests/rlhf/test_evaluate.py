"""Comparisons of two models: the interval, the judge's outcomes, KL and alignment tax, each recomputed by hand."""

from __future__ import annotations

import json

import pytest
import torch
from tools import longer, write_jsonl, written

from rlhf import evaluate as evaluation
from rlhf.checkpoints import RunError
from rlhf.config import EvaluateConfig, GenerateConfig, LengthConfig
from rlhf.data import DataError
from rlhf.evaluate import Rate, evaluate, generate, win_rate
from rlhf.loading import ModelError, load_tokenizer
from rlhf.models import LanguageModel, ScalarModel
from rlhf.settings import ConfigError


@pytest.fixture(scope="module")
def other(tmp_path_factory, base):
    """A model that differs from the base."""
    torch.manual_seed(9)
    model = LanguageModel.load(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    directory = tmp_path_factory.mktemp("other")
    model.save(directory, load_tokenizer(base))
    return str(directory)


@pytest.fixture
def make(evaluate_config, other):
    def config(**options):
        return evaluate_config(**{"model": other} | options)

    return config


@pytest.mark.parametrize(
    ("outcomes", "low", "high"),
    [
        ([1] * 10, 0.7225, 1.0),
        ([0] * 10, 0.0, 0.2775),
        ([1] * 5 + [0] * 5, 0.2366, 0.7634),
        ([1] * 72 + [0] * 28, 0.6251, 0.7986),
    ],
)
def test_wilson_interval(outcomes, low, high):
    """Against published values of the score interval."""
    rate = win_rate(outcomes)
    assert rate.rate == sum(outcomes) / len(outcomes)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=5e-4)


def test_ties_count_half():
    assert win_rate([0.5] * 8).rate == 0.5
    assert win_rate([1, 0.5, 0.5, 0]).rate == 0.5


def test_more_comparisons_narrow_the_interval():
    few, many = win_rate([1, 0, 1] * 5), win_rate([1, 0, 1] * 500)
    assert many.low > few.low
    assert many.high < few.high
    assert few.low < 2 / 3 < few.high


def test_no_comparisons():
    with pytest.raises(ValueError, match="outcomes: is empty"):
        win_rate([])


def test_rate_reads_well():
    assert str(Rate(0.712, 0.5, 0.85)) == "71.2% [50.0%, 85.0%]"


def test_reward_model_as_judge(make, reward_model, base, monkeypatch):
    """Rewards and outcomes, recomputed by transformers from the tokens that were sampled."""
    sampled, sample_all = [], evaluation.sample_all

    def recorded(candidate, model, ids, *arguments):
        found = sample_all(candidate, model, ids, *arguments)
        sampled.insert(0, [prompt + tokens for prompt, tokens in zip(ids, found, strict=True)])  # the baseline is first
        return found

    monkeypatch.setattr(evaluation, "sample_all", recorded)
    config = make(judge=reward_model, temperature=0.8)
    figures = evaluate(config)
    scorer = ScalarModel.load(reward_model).eval()
    with torch.no_grad():
        scores = [
            [scorer.model(torch.tensor([ids])).logits[0, 0].item() + scorer.bias for ids in sequences]
            for sequences in sampled
        ]
    records, tokenizer = written(config), load_tokenizer(base)
    assert len(records) == figures["prompts"] == 40
    for record, a, b in zip(records, *scores, strict=True):
        assert record["outcomes"] == [float(a > b) if abs(a - b) > 1e-4 else 0.5]
        assert record["rewards"] == pytest.approx([a, b], abs=1e-4)
    sides = (figures["models"][0], figures["baseline"])
    for i, (side, sequences, found) in enumerate(zip(sides, sampled, scores, strict=True)):
        assert side["reward"] == pytest.approx(sum(found) / 40, abs=1e-4)
        texts = [f"{record['prompt']} {record['completions'][i]}".strip() for record in records]
        assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]
    assert figures["models"][0]["win_rate"]["rate"] == sum(record["outcomes"][0] for record in records) / 40
    assert {record["outcomes"][0] for record in records} >= {0.0, 1.0}


def test_function_as_judge(make):
    config = make(judge=f"{__name__}:longer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(longer=longer))
        figures = evaluate(config)
    records = written(config)
    assert [record["outcomes"] for record in records] == [[longer(r["prompt"], *r["completions"])] for r in records]
    assert figures["models"][0]["win_rate"]["rate"] == sum(record["outcomes"][0] for record in records) / 40
    assert "reward" not in figures["models"][0]
    assert not any("rewards" in record for record in records)


@pytest.mark.parametrize("judge", ["rlhf.evaluate:no_such_function", "no_such_module:judge"])
def test_no_such_judge(make, judge):
    with pytest.raises(ConfigError, match=f"judge: '{judge}' names no Python function"):
        evaluate(make(judge=judge))


def test_a_judge_that_gives_nan_prefers_nothing(make, reward_model, tmp_path):
    model = ScalarModel.load(reward_model)
    torch.nn.init.constant_(model.head.weight, 3e38)  # finite, or it would not be loaded; its products are not
    model.save(tmp_path / "nan", load_tokenizer(reward_model))
    with pytest.raises(ModelError, match=r"judge: the score of the completion of .* gives .* for the prompt"):
        evaluate(make(judge=str(tmp_path / "nan")))


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (lambda *_: 1 / 0, "judge: failed at the prompt 'w.*': ZeroDivisionError"),
        (lambda *_: None, "judge: returned None for the prompt 'w.*', must be a number from 0 to 1"),
        (lambda *_: float("nan"), "judge: returned nan for the prompt"),
        (lambda *_: "1", "judge: returned '1' for the prompt"),
        (lambda *_: -1, "judge: returned -1 for the prompt"),
        (lambda *_: 2.0, "judge: returned 2.0 for the prompt"),
    ],
)
def test_a_judge_in_python_that_says_nothing_of_use(make, judge, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        evaluate(make(judge=judge))
    assert not (tmp_path / "out/results.json").exists()


def test_figures_that_are_not_finite_are_no_result(make, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "kl_between", lambda *_: float("inf"))
    with pytest.raises(ModelError, match=r"kl of .*: is inf"):
        evaluate(make())
    assert not (tmp_path / "out/results.json").exists()


def test_every_model_must_have_room(make, base, reward_model, data, tmp_path):
    """The baseline and the judge read the prompts and answers too, and may have a shorter context than the model."""
    for setting, cls, source in (("baseline", LanguageModel, base), ("judge", ScalarModel, reward_model)):
        short = cls.load(source)
        embedding = torch.nn.Embedding(18, 32)
        embedding.weight.data.copy_(short.model.transformer.wpe.weight[:18])
        short.model.transformer.wpe = embedding
        short.model.config.n_positions = 18
        short.save(tmp_path / setting, load_tokenizer(base))
        with pytest.raises(DataError, match="exceed the model's context of 18"):
            evaluate(make(**{setting: str(tmp_path / setting), "lengths": LengthConfig(16, 16)}))
    with pytest.raises(ConfigError, match=r"pretraining_tokens: is 20, must be at most 18, the context of .*baseline"):
        evaluate(
            make(prompts=[], baseline=str(tmp_path / "baseline"), pretraining_data=data.texts, pretraining_tokens=20)
        )


def test_language_model_is_no_judge(make, base):
    with pytest.raises(ModelError, match="is not a reward model"):
        evaluate(make(judge=base))


def test_without_judge(make):
    figures = evaluate(make())
    [mine] = figures["models"]
    assert mine.keys() == {"name", "kl"}
    assert mine["kl"] != 0


def test_a_model_against_itself(make, base, reward_model, data):
    """Same seed, same samples: all ties, no KL, no tax."""
    figures = evaluate(make(model=base, judge=reward_model, pretraining_data=data.texts))
    [mine] = figures["models"]
    assert mine["win_rate"]["rate"] == 0.5
    assert mine["reward"] == figures["baseline"]["reward"]
    assert mine["kl"] == 0
    assert mine["alignment_tax"] == 0
    assert [mine["name"], figures["baseline"]["name"]] == [base, f"{base} (2)"]


def test_kl_is_that_of_the_next_token(make, other, base, tmp_path):
    """Answers of one token: the mean log-ratio approaches the KL of the two distributions, which is exact here."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "w01 w02"}] * 4000)
    config = make(prompts=prompts, lengths=LengthConfig(max_prompt_tokens=16, max_response_tokens=1), batch_size=4000)
    ids = load_tokenizer(base)("w01 w02", return_tensors="pt").input_ids
    with torch.no_grad():
        p, q = (LanguageModel.load(path).eval().model(ids).logits[0, -1].log_softmax(-1) for path in (other, base))
    expected = (p.exp() * (p - q)).sum().item()
    spread = (p.exp() * (p - q - expected).square()).sum().sqrt().item()
    assert expected > 0.02
    assert evaluate(config)["models"][0]["kl"] == pytest.approx(expected, abs=4 * spread / 4000**0.5)


def test_alignment_tax(make, other, base, data):
    """Mean cross entropy on the chunks, by transformers' own loss."""
    figures = evaluate(make(prompts=[], pretraining_data=data.texts, tokens_per_forward=64))
    tokenizer = load_tokenizer(base)
    with open(data.texts) as file:
        ids = [i for line in file for i in [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]]
    chunks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    with torch.no_grad():
        losses = [
            LanguageModel.load(path).eval().model(input_ids=chunks, labels=chunks).loss.item() for path in (other, base)
        ]
    [mine] = figures["models"]
    assert mine["pretraining_loss"] == pytest.approx(losses[0], abs=1e-4)
    assert figures["baseline"]["pretraining_loss"] == pytest.approx(losses[1], abs=1e-4)
    assert mine["alignment_tax"] == pytest.approx(losses[0] - losses[1], abs=1e-4)
    assert "kl" not in mine


def test_what_is_written(make, reward_model, data, tmp_path):
    figures = evaluate(make(judge=reward_model, pretraining_data=data.texts))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == figures
    page = (tmp_path / "out" / "report.md").read_text()
    for words in ("win rate", "KL to the baseline", "alignment tax", "mean reward", "![win rates](win_rates.png)"):
        assert words in page
    assert (tmp_path / "out" / "win_rates.png").stat().st_size > 1000


def test_seed(make):
    texts = []
    for name, seed in (("first", 1), ("again", 1), ("another", 2)):
        config = make(name=name, seed=seed)
        evaluate(config)
        texts.append(written(config))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_nothing_to_evaluate():
    with pytest.raises(ConfigError, match="prompts: is "):
        EvaluateConfig(model="a", baseline="b", output_dir="c")


def test_output_dir_is_a_file(make, tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(RunError, match="cannot be used for output"):
        evaluate(make())


@pytest.fixture
def generation(tmp_path, base, data):
    def config(**options):
        settings = {"model": base, "prompts": data.prompts, "output_dir": str(tmp_path / "answers")}
        lengths = LengthConfig(max_prompt_tokens=16, max_response_tokens=6)
        return GenerateConfig(**settings | {"lengths": lengths, "device": "cpu"} | options)

    return config


def test_generate(generation):
    path = generate(generation(samples=4))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 40
    assert all(set(record) == {"prompt", "completions"} and len(record["completions"]) == 4 for record in records)
    assert any(len(set(record["completions"])) == 4 for record in records)
    assert all(len(text.split()) <= 6 and "<eos>" not in text for record in records for text in record["completions"])


def test_generate_keeps_further_fields(generation, tmp_path):
    """An id is kept, and so are the tools that the prompt was written with, but not the answers of another model."""
    records = [{"prompt": f"w0{i}", "id": i, "source": {"page": i}, "completions": ["w01", "w02"]} for i in range(3)]
    path = generate(generation(prompts=write_jsonl(tmp_path / "prompts.jsonl", records)))
    for record, line in zip(records, map(json.loads, path.read_text().splitlines()), strict=True):
        assert line["completions"] != record["completions"]
        assert {name: line[name] for name in ("prompt", "id", "source")} == {
            name: record[name] for name in ("prompt", "id", "source")
        }
        assert set(line) == set(record)


def test_generate_keeps_the_order_of_prompts(generation, data):
    records = [json.loads(line) for line in generate(generation()).read_text().splitlines()]
    with open(data.prompts) as file:
        assert [record["prompt"] for record in records] == [json.loads(line)["prompt"] for line in file]


def test_generate_greedily(generation, tmp_path):
    """At temperature 0 nothing is random: neither the seed nor the batch size changes a word."""
    first = generate(generation(temperature=0.0, samples=2))
    second = generate(generation(temperature=0.0, seed=5, batch_size=7, samples=2, output_dir=str(tmp_path / "again")))
    assert first.read_bytes() == second.read_bytes()
    assert all(len(set(json.loads(line)["completions"])) == 1 for line in first.read_text().splitlines())


def test_generate_does_not_overwrite(generation, tmp_path):
    path = tmp_path / "answers/completions.jsonl"
    path.parent.mkdir()
    path.write_text("kept")
    with pytest.raises(ConfigError, match="exists; choose another directory"):
        generate(generation())
    assert path.read_text() == "kept"


def test_generate_into_a_file_s_place(generation, tmp_path):
    (tmp_path / "answers").write_text("in the way")
    with pytest.raises(RunError, match="could not be written"):
        generate(generation())


def test_answers_must_fit_the_context(generation):
    with pytest.raises(DataError, match=r"prompts.jsonl:1: field 'prompt': .*exceed the model's context of 64"):
        generate(generation(lengths=LengthConfig(max_prompt_tokens=16, max_response_tokens=64)))
