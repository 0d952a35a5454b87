"""Comparing models that differ: in tokenizer, family and prefix, several at once, judged by people."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tools import WORDS, longer, only_line, tiny_gpt2, write_jsonl, written
from transformers import T5Config, T5ForConditionalGeneration

from rlhf.config import GenerateConfig, LengthConfig
from rlhf.demo.pretrain import make_tokenizer
from rlhf.evaluate import evaluate, generate
from rlhf.judges import RewardModelJudge
from rlhf.loading import ModelError, load_tokenizer
from rlhf.models import ScalarModel
from rlhf.rates import difference
from rlhf.settings import ConfigError


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model whose tokenizer has the words in another order, and some more."""
    torch.manual_seed(5)
    tokenizer = make_tokenizer([*reversed(WORDS), "one", "more"])
    directory = tmp_path_factory.mktemp("foreign")
    tiny_gpt2(len(tokenizer), tokenizer.eos_token_id).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def t5(tmp_path_factory, tokenizer):
    """An encoder–decoder model. Its weights are large enough that what it says depends on the prompt."""
    torch.manual_seed(6)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=pad,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    directory = tmp_path_factory.mktemp("t5")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def reward_of(reward_model, prompt, response):
    """What the reward model makes of a completion's last token, which for transformers would not be padding."""
    scorer = ScalarModel.load(reward_model).eval()
    ids = torch.tensor([load_tokenizer(reward_model)(prompt).input_ids + response])
    with torch.no_grad():
        return scorer.head(scorer.inner(input_ids=ids).last_hidden_state[0, -1]).item() + scorer.bias


def test_another_tokenizer(evaluate_config, foreign, base, reward_model, data, caplog, monkeypatch):
    """The judge reads the text in its own tokens. There is no KL, nor a tax."""
    given, judge = [], RewardModelJudge.judge
    monkeypatch.setattr(
        RewardModelJudge,
        "judge",
        lambda self, prompts, *answers: given.append(answers) or judge(self, prompts, *answers),
    )
    long = {"lengths": LengthConfig(max_prompt_tokens=16, max_response_tokens=20), "judge": reward_model}
    config = evaluate_config(model=foreign, pretraining_data=data.texts, **long)
    with caplog.at_level(logging.WARNING):
        figures = evaluate(config)
    assert f"{foreign}: has no alignment tax, since its tokens are not those of the baseline" in caplog.messages
    [mine] = figures["models"]
    assert mine.keys() == {"name", "win_rate", "judged", "reward"}
    assert figures["baseline"].keys() == {"name", "reward", "pretraining_loss"}
    [([ours], baseline)] = given
    reader, eos = load_tokenizer(reward_model), load_tokenizer(foreign).eos_token_id
    ends = [response[-1] == eos for response in ours.responses]
    assert {True, False} == set(ends)
    for i, record in enumerate(written(config)):
        read = reader(ours.texts[i]).input_ids + [reader.eos_token_id] * (ends[i] or not ours.texts[i])
        a, b = (
            reward_of(reward_model, record["prompt"], read),
            reward_of(reward_model, record["prompt"], baseline.responses[i]),
        )
        assert record["outcomes"] == [0.5 if read == baseline.responses[i] else float(a > b)]
    # Which is judged does not depend on which of the two has the judge's tokenizer.
    turned = evaluate(evaluate_config("turned", model=base, baseline=foreign, **long))
    assert turned["models"][0]["win_rate"]["rate"] == pytest.approx(1 - mine["win_rate"]["rate"])
    assert turned["baseline"]["reward"] == pytest.approx(mine["reward"], abs=1e-5)


def test_encoder_decoder(evaluate_config, t5, base, reward_model, tmp_path, data):
    """What it says, most likely token by most likely token, is what transformers has it say to each prompt alone."""
    config = evaluate_config(model=t5, judge=reward_model)
    figures = evaluate(config)
    assert figures["models"][0].keys() == {"name", "win_rate", "judged", "reward"}
    again = evaluate(evaluate_config("again", model=t5, judge=reward_model))
    assert figures | {"settings": None} == again | {"settings": None}
    lengths = LengthConfig(max_prompt_tokens=16, max_response_tokens=8)
    path = generate(
        GenerateConfig(
            model=t5, prompts=data.prompts, output_dir=str(tmp_path / "greedy"), temperature=0.0, lengths=lengths,
            device="cpu", batch_size=16,
        )
    )  # fmt: skip
    tokenizer, model = load_tokenizer(t5), T5ForConditionalGeneration.from_pretrained(t5).eval()
    said = set()
    for record in map(json.loads, path.read_text().splitlines()):
        ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
        alone = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 1:]
        assert record["completions"] == [tokenizer.decode(alone, skip_special_tokens=True)]
        said.add(record["completions"][0])
    assert len(said) > 3
    with pytest.raises(ConfigError, match="pretraining_data: is given, but the baseline has an encoder"):
        evaluate(evaluate_config(baseline=t5, pretraining_data=data.texts))


def test_encoder_decoder_samples_differ(t5, data, tmp_path):
    lengths = LengthConfig(max_prompt_tokens=16, max_response_tokens=8)
    paths = [
        generate(
            GenerateConfig(
                model=t5, prompts=data.prompts, output_dir=str(tmp_path / name), lengths=lengths, device="cpu",
                samples=4, seed=seed,
            )
        )
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]  # fmt: skip
    texts = [path.read_text() for path in paths]
    assert texts[0] == texts[1] != texts[2]
    records = [json.loads(line) for line in texts[0].splitlines()]
    assert sum(len(set(record["completions"])) > 1 for record in records) > 20


def test_conversations_for_an_encoder(evaluate_config, t5, base, tmp_path):
    user = {"role": "user", "content": "w01 w02"}
    prompts = write_jsonl(tmp_path / "talk.jsonl", [{"prompt": [user, {"role": "assistant", "content": "w03"}, user]}])
    with pytest.raises(ValueError, match=r"talk.jsonl:1: field 'prompt': is a conversation, which \w+ has no way"):
        evaluate(evaluate_config(model=t5, baseline=t5, prompts=prompts))


def test_prefix(evaluate_config, base, other_model, reward_model, data, tmp_path):
    """The model says what it says to prompts with the prefix. The judge does not see it."""
    prefix = tmp_path / "prefix.txt"
    prefix.write_text("w10 w11 w12 \n")
    config = evaluate_config(model=other_model, baseline_prefix=str(prefix), judge=reward_model)
    figures = evaluate(config)
    assert figures["baseline"]["name"] == f"{base} after {prefix}"
    with open(data.prompts) as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    by_hand = write_jsonl(tmp_path / "by_hand.jsonl", [{"prompt": "w10 w11 w12 " + prompt} for prompt in prompts])
    lengths = LengthConfig(max_prompt_tokens=32, max_response_tokens=8)
    path = generate(
        GenerateConfig(model=base, prompts=by_hand, output_dir=str(tmp_path / "hand"), lengths=lengths, device="cpu")
    )
    expected = [json.loads(line)["completions"][0] for line in path.read_text().splitlines()]
    records = written(config)
    assert [record["completions"][1] for record in records] == expected
    assert [record["prompt"] for record in records] == prompts
    plain = evaluate(evaluate_config("plain", model=other_model, judge=reward_model))
    assert [r["completions"][0] for r in written(evaluate_config("plain"))] == [r["completions"][0] for r in records]
    assert plain["models"][0]["reward"] == figures["models"][0]["reward"], "the judge has seen the prefix"
    assert plain["models"][0]["kl"] != pytest.approx(figures["models"][0]["kl"], rel=1e-3)

    one_each = evaluate(evaluate_config("each", model=[base, base], prefix=["", str(prefix)]))
    assert [each["name"] for each in one_each["models"]] == [base, f"{base} after {prefix}"]
    assert [each["kl"] == 0 for each in one_each["models"]] == [True, False]
    with pytest.raises(ConfigError, match="prefix: there are 2 for 1 models; give one for all, or one for each"):
        evaluate(evaluate_config("each", prefix=[str(prefix)] * 2))
    both = evaluate(evaluate_config("both", prefix=str(prefix), baseline_prefix=str(prefix), judge=reward_model))
    assert (both["models"][0]["kl"], both["models"][0]["win_rate"]["rate"]) == (0, 0.5)


@pytest.mark.parametrize(("content", "says"), [(None, "can't be read"), ("\n", "is empty"), (b"\xff", "can't be read")])
def test_bad_prefix(evaluate_config, tmp_path, content, says):
    path = tmp_path / "prefix.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=rf"^baseline_prefix: {path} {says}"):
        evaluate(evaluate_config(baseline_prefix=str(path)))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, tokenizer):
    torch.manual_seed(9)
    directory = tmp_path_factory.mktemp("other_model")
    tiny_gpt2(len(tokenizer), tokenizer.eos_token_id).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_three_models_in_one_table(rlhf, base, other_model, foreign, t5, reward_model, data, tmp_path, evaluate_config):
    command = ["evaluate", "--baseline", base, "--judge", reward_model, "--prompts", data.prompts, "--device", "cpu"]
    command += ["--lengths.max_prompt_tokens", 16, "--lengths.max_response_tokens", 8]
    code, error = rlhf(
        *command, "--output_dir", tmp_path / "three", "--model", other_model, "--model", foreign, "--model", t5
    )
    assert code == 0, error
    figures = json.loads((tmp_path / "three/results.json").read_text())
    assert [each["name"] for each in figures["models"]] == [other_model, foreign, t5]
    for i, each in enumerate(figures["models"]):
        [alone] = evaluate(evaluate_config(f"alone {i}", model=each["name"], judge=reward_model))["models"]
        assert each.keys() == alone.keys()
        for name, value in alone.items():
            assert each[name] == (value if name == "name" else pytest.approx(value, rel=1e-5))
    page = (tmp_path / "three/report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| /")]
    assert [row.split("|")[1].strip() for row in rows] == [other_model, foreign, t5, base]
    records = [json.loads(line) for line in (tmp_path / "three/completions.jsonl").read_text().splitlines()]
    assert all(len(r["completions"]) == len(r["models"]) == 4 and len(r["outcomes"]) == 3 for r in records)


def test_all_kept_models_of_a_run(evaluate_config, base, other_model, tmp_path):
    for number, source in ((20, other_model), (10, base)):
        (tmp_path / f"iteration-{number:06d}").symlink_to(source)
    figures = evaluate(evaluate_config(model=str(tmp_path / "iteration-*")))
    assert [each["name"][-6:] for each in figures["models"]] == ["000010", "000020"]
    assert [each["kl"] == 0 for each in figures["models"]] == [True, False]
    with pytest.raises(ModelError, match=r"step-\*: no directory has such a name"):
        evaluate(evaluate_config(model=str(tmp_path / "step-*")))


# People ----------------------------------------------------------------------------------------------------------


def by_length(record, labeller, marks=True):
    """A ranking that prefers longer answers."""
    lengths = [len(text) for text in record["completions"]]
    ranks = [1 + sum(other > own for other in lengths) for own in lengths]
    return {**record, "ranks": ranks, "labeller": labeller} | (
        {"marks": [max(1, 7 - rank) for rank in ranks]} if marks else {}
    )


def test_people_as_judge(evaluate_config, base, other_model, foreign, tmp_path):
    """Two labellers who agree, of whom one gives marks, are the function that they follow."""
    options = {"model": [other_model, foreign]}
    config = evaluate_config(**options)
    evaluate(config)
    records = written(config)
    people = write_jsonl(
        tmp_path / "people.jsonl",
        [by_length(record, name, marks=name == "Ada") for record in records for name in ("Ada", "Bo")],
    )
    judged, by_function = (
        evaluate(evaluate_config("people", judge=people, **options)),
        evaluate(evaluate_config("function", judge=longer, **options)),
    )
    for i, (mine, expected) in enumerate(zip(judged["models"], by_function["models"], strict=True)):
        assert mine["win_rate"] == expected["win_rate"]
        marks = [by_length(record, "Ada")["marks"] for record in records]
        assert mine["mark"] == pytest.approx(sum(mark[i] for mark in marks) / len(marks))
        assert mine["mark_over_baseline"]["mean"] == pytest.approx(sum(m[i] - m[2] for m in marks) / len(marks))
        assert judged["baseline"]["mark"] == pytest.approx(sum(mark[2] for mark in marks) / len(marks))
    assert "mean mark" in (tmp_path / "people/report.md").read_text()


def test_people_who_differ_and_people_who_skip(evaluate_config, other_model, tmp_path, caplog):
    config = evaluate_config(model=other_model)
    evaluate(config)
    records = [record for record in written(config) if len(set(record["completions"])) > 1][:2]
    first, second = records
    people = [
        {**first, "ranks": [1, 2]},
        {**first, "ranks": [2, 1]},
        {**first, "ranks": [1, 2]},
        {**second, "ranks": [1, 1]},
    ]
    judge = write_jsonl(tmp_path / "people.jsonl", people)
    with caplog.at_level(logging.WARNING):
        figures = evaluate(evaluate_config("judged", model=other_model, judge=judge))
    assert f"judge: 38 of 40 completions of {other_model} were not judged" in caplog.messages
    assert figures["models"][0]["win_rate"]["rate"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert figures["models"][0]["judged"] == 2
    given = [record["outcomes"][0] for record in written(evaluate_config("judged")) if record["outcomes"] != [None]]
    assert sorted(given) == pytest.approx([0.5, 2 / 3])


def test_people_who_judged_something_else(evaluate_config, rlhf, other_model, base, tmp_path, data):
    config = evaluate_config(model=other_model)
    evaluate(config)
    judge = write_jsonl(tmp_path / "people.jsonl", [by_length(record, "Ada") for record in written(config)])
    with pytest.raises(ConfigError, match=r"has other completions of its prompts than those of .*; give the models"):
        evaluate(evaluate_config("seed", model=other_model, judge=judge, seed=4))
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "another", "completions": ["x", "y"], "ranks": [1, 2]}])
    with pytest.raises(ConfigError, match=r"judge: .*other.jsonl has none of the 40 prompts"):
        evaluate(evaluate_config("none", model=other_model, judge=other))
    command = [
        "evaluate",
        "--model",
        base,
        "--baseline",
        base,
        "--prompts",
        data.prompts,
        "--output_dir",
        tmp_path / "x",
    ]
    for record, reason in [
        ({"prompt": "p", "completions": ["x", "y"]}, "field 'ranks': is missing"),
        (
            {"prompt": "p", "completions": ["x", "y"], "ranks": [1]},
            "field 'ranks': has 1 entry but 'completions' has 2",
        ),
        (
            {"prompt": "p", "completions": ["x", "y"], "ranks": [1, 2], "marks": [0, 7]},
            "field 'marks[0]': is 0, expected",
        ),
    ]:
        bad = write_jsonl(tmp_path / "bad.jsonl", [record])
        code, error = rlhf(*command, "--judge", bad, "--device", "cpu", "--lengths.max_response_tokens", 8)
        assert code == 2
        assert f"{bad}:1: {reason}" in only_line(error)
    code, error = rlhf(*command, "--judge", tmp_path / "absent.jsonl", "--device", "cpu")
    assert (code, "absent.jsonl" in only_line(error)) == (2, True)


def test_marks_of_models_that_were_labelled_apart(evaluate_config, other_model, foreign, tmp_path):
    """The baseline's mark is over all that it got, whichever model it was compared with."""
    options = {"model": [other_model, foreign]}
    evaluate(evaluate_config(**options))
    records = written(evaluate_config(**options))
    people = []
    for i, marks in ((0, [6, 7]), (1, [5, 1])):
        for record in records:
            pair = {"prompt": record["prompt"], "completions": [record["completions"][i], record["completions"][2]]}
            people.append({**pair, "ranks": [1, 2], "marks": marks})
    figures = evaluate(evaluate_config("judged", judge=write_jsonl(tmp_path / "people.jsonl", people), **options))
    one, other = figures["models"]
    assert (one["mark"], other["mark"]) == (pytest.approx(6, abs=0.5), pytest.approx(5, abs=0.5))
    assert figures["baseline"]["mark"] == pytest.approx(4, abs=0.5)


def test_an_encoder_decoder_is_sampled_as_the_settings_say(evaluate_config, t5, data, tmp_path):
    """Neither its generation_config, nor the size of a batch, nor how it was given changes a completion."""
    plain = evaluate(evaluate_config(model=t5))
    records = written(evaluate_config(model=t5))
    other = tmp_path / "other"
    model = T5ForConditionalGeneration.from_pretrained(t5)
    model.generation_config.update(num_beams=4, min_length=8, no_repeat_ngram_size=2, repetition_penalty=2.0)
    model.save_pretrained(other)
    load_tokenizer(t5).save_pretrained(other)
    for name, options in [
        ("beams", {"model": str(other)}),
        ("batches", {"model": t5, "batch_size": 3}),
        ("object", {"model": T5ForConditionalGeneration.from_pretrained(t5)}),
    ]:
        figures = evaluate(evaluate_config(name, **options))
        assert figures["prompts"] == plain["prompts"]
        assert [r["completions"] for r in written(evaluate_config(name))] == [r["completions"] for r in records], name


def test_prefixes_that_cannot_be(evaluate_config, base, t5, reward_model, tmp_path):
    prefix = tmp_path / "prefix.txt"
    prefix.write_text("w01 " * 70)
    with pytest.raises(ConfigError, match=rf"prefix: has 70 tokens for {base} after .*, whose context is 64"):
        evaluate(evaluate_config(prefix=str(prefix)))
    prefix.write_text("w01 " * 54)
    with pytest.raises(ValueError, match=rf"field 'prompt': has 5\d tokens, which .* \({base} after {prefix}\)"):
        evaluate(evaluate_config(prefix=str(prefix)))
    user = write_jsonl(tmp_path / "user.jsonl", [{"prompt": [{"role": "user", "content": "w01 w02"}]}])
    path = evaluate(evaluate_config(model=t5, baseline=t5, prefix=str(prefix), prompts=user))
    assert path["prompts"] == 1
    with pytest.raises(ModelError, match="is a reward model, which writes nothing"):
        evaluate(evaluate_config(model=reward_model))


def test_names(evaluate_config, base, other_model, monkeypatch, tmp_path):
    """Each row has a name of its own, and a directory may have any."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a (2)", "x[1]", "$a_^$"):
        (tmp_path / name).symlink_to(base)
    models = ["a", "a (2)", "a", "a", "x[1]", "$a_^$"]
    figures = evaluate(evaluate_config(model=models, baseline="a", judge=longer))
    names = [each["name"] for each in (*figures["models"], figures["baseline"])]
    assert names == ["a", "a (2)", "a (3)", "a (4)", "x[1]", "$a_^$", "a (5)"]


def test_difference_by_hand():
    found = difference([(7, 5), (4, 4), (3, 4)])
    assert found.mean == pytest.approx(1 / 3)  # 2, 0, −1: variance 7/3, standard error √(7/9)
    assert (found.low, found.high) == pytest.approx((1 / 3 - 1.96 * (7 / 9) ** 0.5, 1 / 3 + 1.96 * (7 / 9) ** 0.5))
    with pytest.raises(ValueError, match="at least two"):
        difference([(7, 5)])
