"""Step 2: a reward model from ranked completions (Ouyang et al. 2022, section 3.5, equation 1, appendix C.2).

    loss(θ) = −1 / C(K,2) · E_(x, y_w, y_l)~D [ log σ( r_θ(x, y_w) − r_θ(x, y_l) ) ]

All K completions of a prompt are one batch element, with all C(K, 2) pairs in the loss. The prompt and each completion
go through the model once (in models that do not allow this, the prompt goes along with each completion). If the pairs
were shuffled as separate examples, they would need C(K, 2) passes and overfit. Tied completions are not a pair. The
loss does not change when a constant is added to r, so after training a bias makes the demonstrations score 0 on
average.

    rlhf reward --model runs/sft/model --data comparisons.jsonl --output_dir runs/reward
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf import report
from rlhf.batch import Group
from rlhf.config import RewardConfig, cosine_to_tenth
from rlhf.data import (
    Limits,
    RankedExample,
    read_comparisons,
    read_demonstrations,
    tokenize_comparisons,
    tokenize_demonstrations,
)
from rlhf.loading import check_embedded, load_tokenizer, shared_context
from rlhf.models import ScalarModel, unwrap
from rlhf.sharding import Passes
from rlhf.training import (
    Run,
    accumulate,
    backward,
    batch_indices,
    hold_out,
    make_optimizer,
    optimizer_step,
)
from rlhf_kernels import pairwise_ranking_loss


def train(config: RewardConfig, *, resume: bool = False) -> Path:
    """Trains a reward model on ``config.data`` and returns the directory of the result."""
    records = read_comparisons(config.data)
    demonstration_records = read_demonstrations(config.demonstrations) if config.demonstrations else []
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    limits = Limits(**asdict(config.lengths), context_length=shared_context(config.model))
    comparisons = tokenize_comparisons(records, tokenizer, limits)
    demonstrations = tokenize_demonstrations(demonstration_records, tokenizer, limits) if demonstration_records else []
    groups = [each.group for each in comparisons] + [each.group for each in demonstrations]
    check_embedded(tokenizer, groups, config.model)
    training, held_out = hold_out(len(comparisons), config.held_out_fraction, config.seed)

    run = Run("reward", config, resume=resume)
    if run.finished:
        return run.directory / "model"
    model = ScalarModel.load(config.model, attention=config.attention, device=run.device)
    model = run.place_trained(model.eval(), config.model)  # no dropout: the paper names it for SFT alone
    model, optimizer = run.prepare((model, make_optimizer(model, config.adam)))

    steps = math.ceil(config.epochs * len(training) / config.batch_size)
    for step in run.steps(steps):
        indices = batch_indices(len(training), config.batch_size, step, seed=config.seed, epochs=config.epochs)
        batch = [comparisons[training[i]] for i in indices]
        factor = cosine_to_tenth(step, steps)
        # A short last batch may leave a process without a share. It still runs, on an example without a pair, since the
        # other processes wait for its gradient.
        share = run.processes.share(batch) or [batch[0].idle]
        loss, accuracy = ranking_step(run, model, share, prompts=len(batch))
        run.require_finite(loss=loss)
        norm = optimizer_step(run, model, optimizer, config.adam, factor)
        metrics = {"loss": loss, "accuracy": accuracy, "pairs": sum(map(pair_count, batch))}
        metrics |= {"learning_rate": config.adam.learning_rate * factor, "gradient_norm": norm}
        run.log(step, metrics, show=["loss", "accuracy"])

    reward_model = unwrap(model)
    rows: dict[str, float] = {
        "prompts": len(training),
        "pairs": sum(pair_count(comparisons[i]) for i in training),
        "steps": steps,
    }
    if held_out:
        rows["held-out prompts"] = len(held_out)
        with run.accelerator.autocast():  # of itself only a model that is whole has it
            rows["held-out accuracy"] = ranking_accuracy(
                reward_model, [comparisons[i] for i in held_out], config.tokens_per_forward
            )
    if demonstrations:
        with run.accelerator.autocast():
            scores = score(reward_model, [example.group for example in demonstrations], config.tokens_per_forward)
        run.require_finite(score_of_the_demonstrations=scores.mean().item())
        reward_model.bias -= scores.mean().item()
        rows["bias, for demonstrations to score 0"] = reward_model.bias
    report.write(run, "Reward model", rows, curves=[["loss"], ["accuracy"], ["learning_rate"]])
    path = run.save_model(reward_model, tokenizer)
    run.close()
    return path


def ranking_step(run: Run, model: ScalarModel, comparisons: list[RankedExample], prompts: int) -> tuple[float, float]:
    """Accumulates the gradient of the mean loss over a batch of ``prompts``. Returns that loss and the accuracy."""
    loss_sum = accuracy_sum = 0.0
    for part, batch in accumulate(run, model, comparisons):
        with run.accelerator.autocast():
            scores = model(batch, batch.last)
        loss, accuracy = pairwise_ranking_loss(scores, **rank_arguments(part, scores.device))
        share = len(part) / prompts
        backward(run, loss, share)
        loss_sum += loss.item() * share
        accuracy_sum += accuracy.item() * share
    return run.processes.sum(loss_sum).item(), run.processes.sum(accuracy_sum).item()


@torch.no_grad()
def ranking_accuracy(model: ScalarModel, comparisons: list[RankedExample], tokens_per_forward: int) -> float:
    """How often the model orders a pair as its labeller did; the mean over prompts."""
    scores = score(model, [example.group for example in comparisons], tokens_per_forward)
    return pairwise_ranking_loss(scores, **rank_arguments(comparisons, scores.device))[1].item()


@torch.no_grad()
def score(model: ScalarModel, groups: Sequence[Group], tokens_per_forward: int) -> Tensor:
    """(S,) rewards of all responses, in order."""
    with Passes(model) as passes:
        scores = [passes(model.forward, batch, batch.last) for batch in model.batches(groups, tokens_per_forward)]
    return torch.cat(scores) if scores else torch.zeros(0, device=model.device)


def rank_arguments(comparisons: list[RankedExample], device: torch.device) -> dict[str, Any]:
    """``ranks`` and ``offsets`` of the ranking loss, for the scores of all their completions, in order."""
    sizes = torch.tensor([0, *(len(example.ranks) for example in comparisons)])
    ranks = torch.tensor([rank for example in comparisons for rank in example.ranks])
    return {"ranks": ranks.to(device), "offsets": sizes.cumsum(0).to(device)}


def pair_count(example: RankedExample) -> int:
    """Pairs of a prompt's completions that are not tied."""
    return sum(a < b for a in example.ranks for b in example.ranks)
