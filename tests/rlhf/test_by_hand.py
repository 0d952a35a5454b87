"""A run of each stage against the same run written out in plain torch: one sequence at a time, by Hugging Face's own
models, and straight from the files. Every setting has a value that matters, so a setting that is dropped, swapped with
another or given to the wrong part changes the weights or the figures.
"""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tools import metrics
from torch.nn.functional import logsigmoid

from rlhf import ppo, report, reward, sft
from rlhf.config import Adam
from rlhf.loading import load_tokenizer
from rlhf.models import Backbone, LanguageModel, ScalarModel
from rlhf.training import Run, batch_indices, hold_out


@pytest.fixture
def told(monkeypatch):
    """Records what a run says besides its metrics: its report, which is not drawn here; the figures beside its progress
    bar; and for each batch that it splits into parts, the lengths of the sequences and the tokens of a part."""
    said = SimpleNamespace(shown=[], parted=[])
    log, steps, parts = Run.log, Run.steps, Backbone.parts

    def keep_report(run, title, rows, curves):
        said.title, said.rows, said.curves = title, dict(rows), list(curves)

    def keep_shown(run, step, figures, show):
        said.shown.append(list(show))
        log(run, step, figures, show)

    def keep_unit(run, total, unit="steps"):
        said.counted = f"{total} {unit}"
        return steps(run, total, unit)

    def keep_parted(model, groups, tokens):
        lengths = [[len(group.prompt) + len(response) for response in group.responses] for group in groups]
        said.parted.append((lengths, tokens))
        return parts(model, groups, tokens)

    monkeypatch.setattr(Backbone, "parts", keep_parted)
    monkeypatch.setattr(report, "write", keep_report)
    monkeypatch.setattr(Run, "steps", keep_unit)
    monkeypatch.setattr(Run, "log", keep_shown)
    return said


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def ids(tokenizer, text):
    return tokenizer(text).input_ids


def demonstrations(path, tokenizer, longest_prompt, longest_response):
    """Prompts over the limit are dropped; completions end in EOS, and are cut."""
    pairs = [(ids(tokenizer, each["prompt"]), ids(tokenizer, each["completion"])) for each in records(path)]
    eos = tokenizer.eos_token_id
    kept = [
        (prompt, [*completion, eos][:longest_response]) for prompt, completion in pairs if len(prompt) <= longest_prompt
    ]
    assert len(kept) < len(pairs)
    assert len({len(prompt) for prompt, _ in kept}) > 1
    assert any(completion[-1] != eos for _, completion in kept)
    assert any(completion[-1] == eos for _, completion in kept)
    return kept


def chunks(path, tokenizer, length):
    """All texts, each with an EOS, in chunks. The first token of a chunk is read, but not predicted."""
    stream = [token for each in records(path) for token in [*ids(tokenizer, each["text"]), tokenizer.eos_token_id]]
    whole = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    return [(chunk[:1], chunk[1:]) for chunk in whole]


def log_probs(model, prompt, response, temperature=1.0):
    """The log-probs of all tokens at each place of the response: (len(response), V)."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def negative_log_likelihoods(model, examples):
    """The negative log-likelihood of each token of the completions."""
    return torch.cat(
        [-log_probs(model, prompt, response)[range(len(response)), response] for prompt, response in examples]
    )


def scalars(model, prompt, response):
    """A scalar model's output at every position."""
    states = model.model.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
    return states @ model.head.weight[0] + model.bias


def parted(examples):
    """What ``told`` records when prompts, each with all its completions, are split into parts of 20 tokens."""
    groups = [[len(prompt) + len(each) for each in responses] for prompt, responses in examples]
    return groups, 20


def alone(examples):
    return parted([(prompt, [response]) for prompt, response, *_ in examples])


def adam_of(model, settings):
    betas = (settings.beta1, settings.beta2)
    return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=betas, eps=settings.eps)


def step(model, optimizer, settings, factor):
    """Clips, steps and returns the norm that the gradient had."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], settings.max_grad_norm)
    assert norm > settings.max_grad_norm  # or the limit would not act
    optimizer.param_groups[0]["lr"] = settings.learning_rate * factor
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def assert_same_weights(path, model):
    ours = load_file(Path(path) / "model.safetensors")
    theirs = model.state_dict()
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=0, msg=lambda text, name=name: name + text)


def assert_same_figures(found, expected, **tolerance):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, **{"rel": 1e-3, "abs": 2e-5} | tolerance)


def test_sft(sft_config, data, base, told):
    adam = Adam(3e-3, beta1=0.7, beta2=0.8, eps=1e-3, max_grad_norm=0.3)
    config = sft_config(
        seed=3, epochs=2, batch_size=7, held_out_fraction=0.2, residual_dropout=0.0, adam=adam,
        lengths={"max_prompt_tokens": 3, "max_response_tokens": 7}, pretraining_data=data.texts,
        pretraining_fraction=0.3, pretraining_tokens=10, tokens_per_forward=20,
    )  # fmt: skip
    path = sft.train(config)

    tokenizer, model = load_tokenizer(base), LanguageModel.load(base).eval().model
    examples, mixed = demonstrations(data.demonstrations, tokenizer, 3, 7), chunks(data.texts, tokenizer, 10)
    training, held_out = hold_out(len(examples), 0.2, 3)
    optimizer, steps = adam_of(model, adam), math.ceil(2 * len(training) / 5)

    def held_out_loss():
        forwards.append(alone([examples[i] for i in held_out]))
        with torch.no_grad():
            return negative_log_likelihoods(model, [examples[i] for i in held_out]).mean().item()

    expected, forwards, seen = [], [], 0
    for number in range(steps):
        figures = {"step": number} | ({} if number else {"held_out_loss_before": held_out_loss()})
        chosen = batch_indices(len(training), 5, number, seed=3, epochs=2)
        batch = [examples[training[i]] for i in chosen]
        batch += [mixed[i] for i in batch_indices(len(mixed), 2, number, seed=3)]
        forwards.append(alone(batch))
        loss = negative_log_likelihoods(model, batch).mean()
        loss.backward()
        factor = 0.1 + 0.45 * (1 + math.cos(math.pi * number / (steps - 1)))
        norm = step(model, optimizer, adam, factor)
        figures |= {"loss": loss.item(), "learning_rate": 3e-3 * factor, "gradient_norm": norm}
        epochs_before, seen = seen // len(training), seen + 5
        if seen // len(training) > epochs_before or number == steps - 1:
            figures["held_out_loss"] = held_out_loss()
        expected.append(figures)

    assert len(training) % 5
    assert [("held_out_loss" in figures) for figures in expected].count(True) == 2
    assert_same_weights(path, model)
    assert_same_figures(metrics(Path(config.output_dir)), expected)
    assert told.title == "Supervised fine-tuning"
    assert told.rows == pytest.approx(
        {
            "demonstrations": len(training),
            "epochs": 2,
            "steps": steps,
            "held-out loss before (nats per token)": expected[0]["held_out_loss_before"],
            "held-out loss after": expected[-1]["held_out_loss"],
        },
        rel=1e-3,
    )
    assert told.curves == [["loss", "held_out_loss"], ["learning_rate"]]
    assert told.shown == [["loss", "held_out_loss"]] * steps
    assert told.counted == f"{steps} steps"
    assert told.parted == forwards


def ranking(model, example):
    """The mean loss of a prompt's pairs, and the share of them in the right order, equal scores being half."""
    prompt, completions, ranks = example
    scores = torch.stack([scalars(model, prompt, completion)[-1] for completion in completions])
    pairs = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2)]
    pairs = [(winner, loser) for winner, loser in pairs if ranks[winner] != ranks[loser]]
    margins = torch.stack([scores[winner] - scores[loser] for winner, loser in pairs])
    return -logsigmoid(margins).mean(), (0.5 * (margins.sign() + 1)).mean().item(), len(pairs)


def test_reward(reward_config, data, base, told):
    adam = Adam(3e-3, beta1=0.7, beta2=0.8, eps=1e-3, max_grad_norm=0.3)
    config = reward_config(
        seed=3, epochs=2, batch_size=5, held_out_fraction=0.25, adam=adam, demonstrations=data.demonstrations,
        lengths={"max_prompt_tokens": 3, "max_response_tokens": 4}, tokens_per_forward=20,
    )  # fmt: skip
    path = reward.train(config)

    tokenizer, model = load_tokenizer(base), ScalarModel.load(base).eval()
    examples = [
        (
            ids(tokenizer, each["prompt"]),
            [[*ids(tokenizer, completion), tokenizer.eos_token_id][:4] for completion in each["completions"]],
            each["ranks"],
        )
        for each in records(data.comparisons)
    ]
    training, held_out = hold_out(len(examples), 0.25, 3)
    optimizer, steps = adam_of(model, adam), math.ceil(2 * len(training) / 5)
    expected, forwards = [], []
    for number in range(steps):
        batch = [examples[training[i]] for i in batch_indices(len(training), 5, number, seed=3, epochs=2)]
        forwards.append(parted([(prompt, completions) for prompt, completions, _ in batch]))
        losses, accuracies, pairs = zip(*(ranking(model, example) for example in batch), strict=True)
        loss = torch.stack(losses).mean()
        loss.backward()
        factor = 0.1 + 0.45 * (1 + math.cos(math.pi * number / (steps - 1)))
        norm = step(model, optimizer, adam, factor)
        figures = {"step": number, "loss": loss.item(), "accuracy": sum(accuracies) / len(batch), "pairs": sum(pairs)}
        expected.append(figures | {"learning_rate": 3e-3 * factor, "gradient_norm": norm})
    assert len(batch) < 5
    with torch.no_grad():
        accuracy = sum(ranking(model, examples[i])[1] for i in held_out) / len(held_out)
        rated = demonstrations(data.demonstrations, tokenizer, 3, 4)
        mean = torch.stack([scalars(model, prompt, response)[-1] for prompt, response in rated]).mean().item()

    assert_same_weights(path, model.model)
    assert_same_figures(metrics(Path(config.output_dir)), expected)
    assert ScalarModel.load(str(path)).bias == pytest.approx(-mean, rel=1e-3)
    assert told.title == "Reward model"
    assert told.rows == pytest.approx(
        {
            "prompts": len(training),
            "pairs": sum(ranking(model, examples[i])[2] for i in training),
            "steps": steps,
            "held-out prompts": len(held_out),
            "held-out accuracy": accuracy,
            "bias, for demonstrations to score 0": -mean,
        },
        rel=1e-3,
    )
    assert told.curves == [["loss"], ["accuracy"], ["learning_rate"]]
    assert told.shown == [["loss", "accuracy"]] * steps
    assert told.counted == f"{steps} steps"
    held_out_groups = [examples[i][:2] for i in held_out]
    assert told.parted == [*forwards, parted(held_out_groups), alone(rated)]


def words(completions, **_):
    return [len(completion.split()) for completion in completions]


@pytest.fixture
def sampled(monkeypatch):
    """Records the completions that PPO samples. They are the only thing that this file does not compute again."""
    batches, sample = [], ppo.sample

    def keep(policy, prompts, **options):
        completions = sample(policy, prompts, **options)
        batches.append((list(prompts), [completion.tokens for completion in completions], options))
        return completions

    monkeypatch.setattr(ppo, "sample", keep)
    return batches


def advantages_by_hand(rewards, values, gamma, lam):
    """The advantages of one completion, computed from its last token to its first."""
    advantages, following, value = [], 0.0, 0.0
    for reward_, value_ in zip(reversed(rewards), reversed(values), strict=True):
        following = reward_ + gamma * value - value_ + gamma * lam * following
        value = value_
        advantages.insert(0, following)
    return advantages


def test_ppo(ppo_config, data, base, reward_model, told, sampled):
    adam = Adam(4e-3, beta1=0.7, beta2=0.8, eps=1e-3, max_grad_norm=0.2)
    value_adam = Adam(6e-3, beta1=0.6, beta2=0.75, eps=2e-3, max_grad_norm=0.3)
    config = ppo_config(
        seed=3, reward=words, reward_weights=[0.7, -0.3], episodes=19, batch_size=8, minibatch_size=4, inner_epochs=2,
        kl_coefficient=0.4, kl_estimator="k3", gamma=0.9, lam=0.8, whiten_advantages=True, clip_range=0.05,
        value_clip_range=0.3, temperature=0.8, missing_eos_penalty=0.5, warmup_iterations=3, adam=adam,
        value_adam=value_adam, ema_decay=0.7, gamma_ptx=0.6, pretraining_per_episode=2, pretraining_tokens=10,
        lengths={"max_prompt_tokens": 3, "max_response_tokens": 6}, rollout_batch_size=3, tokens_per_forward=20,
        keep_every=1,
    )  # fmt: skip
    path = ppo.train(config)

    tokenizer, model = load_tokenizer(base), LanguageModel.load(base).eval().model
    value_model, scorer = (ScalarModel.load(reward_model).eval() for _ in range(2))
    reference, average = copy.deepcopy(model), copy.deepcopy(model)
    prompts = [ids(tokenizer, each["prompt"]) for each in records(data.prompts)]
    prompts = [prompt for prompt in prompts if len(prompt) <= 3]
    mixed = chunks(data.texts, tokenizer, 10)
    optimizer, value_optimizer = adam_of(model, adam), adam_of(value_model, value_adam)
    assert len(sampled) == 2

    expected, forwards = [], []
    for iteration, (asked, responses, options) in enumerate(sampled):
        assert asked == [prompts[i] for i in batch_indices(len(prompts), 8, iteration, seed=3)]
        ends = {tokenizer.eos_token_id}
        numbers = list(range(8 * iteration, 8 * iteration + 8))
        drawing = {"seed": 3, "streams": numbers}
        assert options == {"end_token_ids": ends, "max_new_tokens": 6, "temperature": 0.8, "batch_size": 3} | drawing
        figures = {"step": iteration, "reward": 0.0, "kl": 0.0, "response_tokens": 0.0, "ended": 0.0}
        episodes = []
        for prompt, response in zip(asked, responses, strict=True):
            at = range(len(response)), response
            with torch.no_grad():
                old = log_probs(model, prompt, response, 0.8)[at]
                log_ratio = old - log_probs(reference, prompt, response, 0.8)[at]
                kl = (-log_ratio).exp() - 1 + log_ratio
                values = scalars(value_model, prompt, response)[len(prompt) - 1 : -1]
                score = 0.7 * scalars(scorer, prompt, response)[-1].item()
            score -= 0.3 * len(tokenizer.decode(response, skip_special_tokens=True).split())
            ended = response[-1] == tokenizer.eos_token_id
            score -= 0.0 if ended else 0.5
            rewards = -0.4 * kl
            rewards[-1] += score
            advantages = torch.tensor(advantages_by_hand(rewards.tolist(), values.tolist(), 0.9, 0.8))
            episodes.append([prompt, response, old, values, advantages, advantages + values])
            of_one = {"reward": score, "kl": kl.sum().item(), "response_tokens": len(response), "ended": ended}
            for name, figure in of_one.items():
                figures[name] += figure / 8
        forwards.append(alone(episodes))  # laid out once for the reference, the value model and the reward model
        everything = torch.cat([episode[4] for episode in episodes])
        for episode in episodes:
            episode[4] = (episode[4] - everything.mean()) / everything.std(correction=0)

        factor = 0.1 + 0.9 * iteration / 3
        sums: dict[str, float] = defaultdict(float)
        for number in range(4):
            part = [episodes[i] for i in batch_indices(8, 4, number, seed=iteration)]
            rows = [log_probs(model, prompt, response, 0.8) for prompt, response, *_ in part]
            new = torch.cat([row[range(len(each[1])), each[1]] for row, each in zip(rows, part, strict=True)])
            old, old_values, advantages, returns = (torch.cat(column) for column in list(zip(*part, strict=True))[2:])
            ratio = (new - old).exp()
            clipped = ratio.clamp(0.95, 1.05)
            losses = torch.maximum(-advantages * ratio, -advantages * clipped)
            picked = batch_indices(len(mixed), 4 * 2, iteration * 4 + number, seed=3)
            pretraining = negative_log_likelihoods(model, [mixed[i] for i in picked]).mean()
            forwards += [alone(part), alone([mixed[i] for i in picked]), alone(part)]
            (losses.mean() + 0.6 * pretraining).backward()
            sums["policy_loss"] += losses.mean().item()
            sums["ratio_mean"] += ratio.mean().item()
            sums["log_ratio_mean"] += (new - old).mean().item()
            sums["approx_kl"] += (ratio - 1 - ratio.log()).mean().item()
            sums["clip_fraction"] += (-advantages * clipped > -advantages * ratio).float().mean().item()
            sums["entropy"] += torch.cat([-(row.exp() * row).sum(-1) for row in rows]).mean().item()
            sums["pretraining_loss"] += pretraining.item()
            sums["gradient_norm"] += step(model, optimizer, adam, factor)
            if number == 0:
                figures["ratio_max_deviation"] = 0.0
            with torch.no_grad():
                for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                    kept.copy_(0.7 * kept + 0.3 * now)

            values = torch.cat([scalars(value_model, each[0], each[1])[len(each[0]) - 1 : -1] for each in part])
            near = values.clamp(old_values - 0.3, old_values + 0.3)
            value_loss = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()
            value_loss.backward()
            sums["value_loss"] += value_loss.item()
            step(value_model, value_optimizer, value_adam, factor)
        figures |= {name: total / 4 for name, total in sums.items()} | {"learning_rate": 4e-3 * factor}
        expected.append(figures)
        if iteration == 0:
            after_first = copy.deepcopy(average)

    assert 0 < expected[0]["ended"] < 1
    assert all(figures["clip_fraction"] > 0 for figures in expected)
    found = metrics(Path(config.output_dir))
    deviations = [figures["ratio_max_deviation"] for figures in found]
    assert_same_figures(found, expected, abs=1e-4)
    assert_same_weights(path, average)
    assert_same_weights(path.with_name("value"), value_model.model)
    assert_same_weights(path.with_name("iteration-000001"), after_first)
    assert_same_weights(path.with_name("iteration-000002"), average)
    assert told.title == "PPO-ptx"
    assert told.rows == pytest.approx(
        {
            "episodes": 16,
            "iterations": 2,
            "β": 0.4,
            "γ_ptx": 0.6,
            "reward, first iteration": expected[0]["reward"],
            "reward, last tenth": expected[1]["reward"],
            f"KL to the SFT model by {config.kl_estimator}, last tenth (nats per completion)": expected[1]["kl"],
            "response tokens, last tenth": expected[1]["response_tokens"],
            "largest deviation of the ratio from 1 before an update": max(deviations),
        },
        rel=1e-3,
    )
    assert told.curves == [["reward"], ["kl"], ["entropy"], ["value_loss"], ["response_tokens"], ["pretraining_loss"]]
    assert told.shown == [["reward", "kl", "pretraining_loss"]] * 2
    assert told.counted == "2 iterations"
    assert told.parted == forwards


def test_ppo_reports_the_last_tenth(ppo_config, told):
    """The last tenth of 21 iterations is two. Every eighth policy is kept. Without a mix the title is PPO."""
    lengths = {"max_prompt_tokens": 16, "max_response_tokens": 3}
    config = ppo_config(episodes=85, batch_size=4, minibatch_size=4, lengths=lengths, keep_every=8)
    path = ppo.train(config)
    assert sorted(kept.name for kept in path.parent.glob("iteration-*")) == ["iteration-000008", "iteration-000016"]
    found = metrics(Path(config.output_dir))
    assert len(found) == 21
    last = {name: (found[-2][name] + found[-1][name]) / 2 for name in ("reward", "kl", "response_tokens")}
    assert told.title == "PPO"
    assert told.rows == {
        "episodes": 84,
        "iterations": 21,
        "β": 0.02,
        "γ_ptx": 0.0,
        "reward, first iteration": found[0]["reward"],
        "reward, last tenth": pytest.approx(last["reward"]),
        "KL to the SFT model by k1, last tenth (nats per completion)": pytest.approx(last["kl"]),
        "response tokens, last tenth": pytest.approx(last["response_tokens"]),
        "largest deviation of the ratio from 1 before an update": max(each["ratio_max_deviation"] for each in found),
    }
