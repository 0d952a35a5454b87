"""Rollouts by transformers' continuous batching: right log-probs and the model's own distribution, or a clear word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools import metrics, only_line

from rlhf import paged, ppo
from rlhf.loading import ModelError
from rlhf.models import LanguageModel
from rlhf.paged import sample_paged
from rlhf.rollout import NotFiniteError

ENDS = {1, 7}
PROMPTS = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]

pytestmark = pytest.mark.skipif(paged.ContinuousBatchingConfig is None, reason="this transformers has no such rollout")


def sampled(model, prompts, **options):
    defaults = {"end_token_ids": ENDS, "max_new_tokens": 6, "temperature": 0.8, "batch_size": 64, "seed": 3}
    return sample_paged(model, prompts, **defaults | options)


def test_log_probs_and_ends(lm):
    """Also where there is room for only some of the prompts at a time."""
    for batch_size in (64, 3):
        found = sampled(lm, PROMPTS * 8, batch_size=batch_size)
        assert len(found) == 32
        for prompt, completion in zip(PROMPTS * 8, found, strict=True):
            tokens = completion.tokens
            assert 0 < len(tokens) <= 6
            assert not ENDS & set(tokens[:-1])
            assert len(tokens) == 6 or tokens[-1] in ENDS
            with torch.no_grad():
                logits = lm.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(completion.logprobs, expected, atol=1e-5, rtol=1e-4)
    assert lm.model.config._attn_implementation == "sdpa"


def test_distribution(lm):
    """Of 4,000 draws of a first token, no token's share is off by more than five standard errors."""
    draws = torch.tensor([each.tokens[0] for each in sampled(lm, [[5, 6]] * 4000, max_new_tokens=1, batch_size=500)])
    with torch.no_grad():
        expected = (lm.next_logits([[5, 6]])[0] / 0.8).softmax(-1)
    shares = draws.bincount(minlength=len(expected)) / len(draws)
    errors = (expected * (1 - expected) / len(draws)).sqrt()
    assert ((shares - expected).abs() < 5 * errors + 1e-4).all()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_ppo(mixed_precision, ppo_config):
    config = ppo_config(rollout="paged", episodes=32, temperature=0.9, mixed_precision=mixed_precision)
    ppo.train(config)
    found = metrics(Path(config.output_dir))
    assert len(found) == 2
    assert found[0]["ratio_max_deviation"] < {"no": 1e-3, "bf16": 0.2}[mixed_precision]
    assert abs(found[0]["kl"]) < {"no": 1e-4, "bf16": 0.2}[mixed_precision]


def test_logits_that_are_not_finite(base):
    model = LanguageModel.load(base).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        sampled(model, PROMPTS)


def test_a_model_that_cannot_be_batched_so(lm, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no such attention\nfor this model")

    monkeypatch.setattr(type(lm.model), "generate_batch", refuse)
    with pytest.raises(ModelError, match="gpt2: can't be sampled with rollout=paged: no such attention"):
        sampled(lm, PROMPTS)


def test_an_older_transformers(rlhf, base, reward_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(paged, "ContinuousBatchingConfig", None)
    settings = ["--policy", base, "--reward_model", reward_model, "--prompts", data.prompts, "--rollout", "paged"]
    status, error = rlhf("ppo", *settings, "--output_dir", tmp_path / "run")
    assert status == 2
    assert "a newer transformers is needed" in only_line(error)
