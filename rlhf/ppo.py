"""Step 3: reinforcement learning from the reward model (Ouyang et al. 2022, section 3.5, equation 2, appendix C.4).

    objective(φ) = E_(x,y)~π_φ^RL [ r_θ(x, y) − β log( π_φ^RL(y|x) / π^SFT(y|x) ) ] + γ E_x~D_pretrain [ log π_φ^RL(x) ]

maximised by PPO: γ = 0 is "PPO", γ > 0 is "PPO-ptx". Each iteration samples a batch of completions (a bandit: one
prompt, one completion, one reward at its end), prices every token's drift from the SFT model, estimates advantages with
a value model that started as the reward model, and takes one pass over the batch in minibatches. The gradient of the
pretraining loss is added in every minibatch. What is kept is the moving average of the policy's weights.

    rlhf ppo --policy runs/sft/model --reward_model runs/reward/model --prompts prompts.jsonl --output_dir runs/ppo
"""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf import report
from rlhf.batch import split
from rlhf.config import PPOConfig, as_list, warmup_from_tenth
from rlhf.data import Limits, read_prompts, read_texts, tokenize_prompts
from rlhf.models import (
    LanguageModel,
    ScalarModel,
    check_reward_config,
    check_same_tokenizer,
    context_length,
    load_config,
    load_tokenizer,
    unwrap,
)
from rlhf.rollout import sample
from rlhf.sft import language_model_step, pretraining_examples
from rlhf.training import Run, accumulate, batch_indices, make_optimizer, mine, optimizer_step, total
from rlhf_kernels import linear_ppo_policy_loss, linear_selective_log_softmax, ppo_advantages, ppo_value_loss

logger = logging.getLogger(__name__)

# How far exp(log π − log π_old) may be from 1 before any update: the sampler and the trainer compute the same number
# by different routes, which rounds differently. More than this means that they do not compute the same thing.
RATIO_TOLERANCE = {"no": 1e-3, "bf16": 0.2, "fp16": 0.05}


@dataclass(frozen=True)
class Episode:
    """A prompt, its completion, and what PPO knows of each token of it. Tensors are (len(response),) float32."""

    prompt: list[int]
    response: list[int]
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Actors:
    """The four models of PPO."""

    policy: LanguageModel
    value: ScalarModel
    reference: LanguageModel
    reward: ScalarModel


def train(config: PPOConfig, *, resume: bool = False) -> Path:
    """Optimises ``config.policy`` against ``config.reward_model`` and returns the directory of the result."""
    records = read_prompts(as_list(config.prompts))
    texts = read_texts(as_list(config.pretraining_data)) if config.gamma_ptx else []
    tokenizer = load_tokenizer(config.policy)
    check_reward_config(config.reward_model)
    check_same_tokenizer(tokenizer, config.policy, config.reward_model)
    limits = Limits(**asdict(config.lengths), context_length=context_length(load_config(config.policy)))
    prompts = [example.prompt_ids for example in tokenize_prompts(records, tokenizer, limits)]
    pretraining = pretraining_examples(texts, tokenizer, config.pretraining_tokens) if texts else []

    run = Run("ppo", config, resume=resume)
    if run.finished:
        return run.directory / "model"
    policy = LanguageModel.load(config.policy, attention=config.attention).eval()  # no dropout: ratios start at 1
    value = ScalarModel.load(config.reward_model, attention=config.attention).eval()
    reference = (
        LanguageModel.load(config.policy, attention=config.attention).eval().requires_grad_(False).to(run.device)
    )
    reward = (
        ScalarModel.load(config.reward_model, attention=config.attention).eval().requires_grad_(False).to(run.device)
    )
    average = copy.deepcopy(policy).requires_grad_(False).to(run.device)
    policy, value, policy_optimizer, value_optimizer = run.prepare(
        policy,
        value,
        make_optimizer(policy, config.adam),
        make_optimizer(value, config.value_adam),
        extra={"average": average},
    )
    actors = Actors(policy, value, reference, reward)

    iterations = config.episodes // config.batch_size
    for iteration in run.steps(iterations, unit="iterations"):
        chosen = batch_indices(len(prompts), config.batch_size, iteration, seed=config.seed)
        episodes, metrics = collect(run, actors, [prompts[i] for i in mine(run, chosen)], tokenizer.eos_token_id)
        factor = warmup_from_tenth(iteration, config.warmup_iterations)

        minibatches = config.batch_size // config.minibatch_size * config.inner_epochs
        for number in range(minibatches):
            size = config.minibatch_size // run.accelerator.num_processes
            picked = batch_indices(len(episodes), size, number, seed=iteration)
            minibatch = [episodes[i] for i in picked]
            stats = policy_step(run, policy, minibatch)
            if number == 0:
                metrics["ratio_max_deviation"] = stats["ratio_max_deviation"]
                check_ratio(iteration, stats["ratio_max_deviation"], config.mixed_precision)
            if config.gamma_ptx:
                chunks = batch_indices(
                    len(pretraining),
                    config.minibatch_size * config.pretraining_per_episode,
                    iteration * minibatches + number,
                    seed=config.seed,
                )
                # Its gradient adds to the policy loss's before the one optimizer step (C.4).
                stats["pretraining_loss"] = language_model_step(
                    run, policy, mine(run, [pretraining[i] for i in chunks]), weight=config.gamma_ptx
                )
            stats["gradient_norm"] = optimizer_step(run, policy, policy_optimizer, config.adam, factor)
            update_average(average, run.accelerator.unwrap_model(policy), config.ema_decay)

            stats["value_loss"] = value_step(run, value, minibatch)
            optimizer_step(run, value, value_optimizer, config.value_adam, factor)
            for name in stats.keys() - {"ratio_max_deviation"}:
                metrics[name] = metrics.get(name, 0.0) + stats[name] / minibatches

        metrics["learning_rate"] = config.adam.learning_rate * factor
        run.log(iteration, metrics, show=["reward", "kl", "pretraining_loss"])
        if config.keep_every and (iteration + 1) % config.keep_every == 0:
            run.save_model(average, tokenizer, f"iteration-{iteration + 1:06d}")

    rows = {"episodes": iterations * config.batch_size, "iterations": iterations, "β": config.kl_coefficient}
    rows |= {"γ_ptx": config.gamma_ptx}
    if run.history:
        tail = run.history[-max(1, iterations // 10) :]
        mean = {name: sum(record[name] for record in tail) / len(tail) for name in ("reward", "kl", "response_tokens")}
        rows |= {
            "reward, first iteration": run.history[0]["reward"],
            "reward, last tenth": mean["reward"],
            "KL to the SFT model, last tenth (nats per completion)": mean["kl"],
            "response tokens, last tenth": mean["response_tokens"],
            "largest deviation of the ratio from 1 before an update": max(
                record["ratio_max_deviation"] for record in run.history
            ),
        }
    curves = [["reward"], ["kl"], ["entropy"], ["value_loss"], ["response_tokens"], ["pretraining_loss"]]
    report.write(run, "PPO-ptx" if config.gamma_ptx else "PPO", rows, curves)
    path = run.save_model(average, tokenizer)
    run.close()
    return path


@torch.no_grad()
def collect(
    run: Run, actors: Actors, prompts: list[list[int]], eos_token_id: int
) -> tuple[list[Episode], dict[str, float]]:
    """Samples a completion for every prompt and works out its rewards and advantages. Each model runs once."""
    config: PPOConfig = run.config
    with run.accelerator.autocast():
        completions = sample(
            actors.policy,
            prompts,
            eos_token_id=eos_token_id,
            max_new_tokens=config.lengths.max_response_tokens,
            temperature=config.temperature,
            batch_size=config.rollout_batch_size,
        )
    responses = [completion.tokens for completion in completions]
    ref_logprobs, values, scores = [], [], []
    for part in split(token_counts(prompts, responses), config.tokens_per_forward):
        batch = actors.reference.lay_out([prompts[i] for i in part], [responses[i] for i in part])
        with run.accelerator.autocast():
            ref_logprobs.append(actors.reference(batch, linear_selective_log_softmax, temperature=config.temperature))
            values.append(actors.value(batch, batch.before))
            scores.append(actors.reward(batch, batch.last))

    # One flat entry per response token, completion after completion; cu_seqlens says where each begins.
    lengths = torch.tensor([len(response) for response in responses])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(run.device)
    logprobs = torch.cat([completion.logprobs for completion in completions]).to(run.device)
    score, value = torch.cat(scores), torch.cat(values)
    advantages, returns, _, kl = ppo_advantages(
        score,
        logprobs,
        torch.cat(ref_logprobs),
        value,
        None,
        beta=config.kl_coefficient,
        estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=config.lam,
        whiten=config.whiten_advantages,
        cu_seqlens=cu_seqlens,
    )
    per_token = [tensor.split(lengths.tolist()) for tensor in (logprobs, value, advantages, returns)]
    episodes = [Episode(*parts) for parts in zip(prompts, responses, *per_token, strict=True)]

    count = total(run, len(prompts))
    ended = sum(response[-1] == eos_token_id for response in responses)
    sums: dict[str, Any] = {"reward": score.sum(), "kl": kl.sum(), "response_tokens": lengths.sum(), "ended": ended}
    return episodes, {name: (total(run, value) / count).item() for name, value in sums.items()}


def policy_step(run: Run, policy: LanguageModel, episodes: list[Episode]) -> dict[str, float]:
    """Accumulates the gradient of the clipped policy loss over a minibatch, and returns its statistics."""
    config: PPOConfig = run.config
    tokens = total(run, sum(len(episode.response) for episode in episodes)).item()
    sums: dict[str, float] = {}
    deviation = 0.0
    for part in accumulate(run, policy, forward_parts(run, episodes)):
        batch = unwrap(policy).lay_out([e.prompt for e in part], [e.response for e in part])
        with run.accelerator.autocast():
            loss, stats = policy(
                batch,
                linear_ppo_policy_loss,
                torch.cat([episode.logprobs for episode in part]),
                torch.cat([episode.advantages for episode in part]),
                None,
                clip_range=config.clip_range,
                temperature=config.temperature,
            )
        share = len(batch.targets) / tokens
        run.accelerator.backward(loss * (share * run.accelerator.num_processes))
        deviation = max(deviation, stats["ratio_max_deviation"].item())
        for name, value in {"policy_loss": loss, **stats}.items():
            sums[name] = sums.get(name, 0.0) + value.item() * share
    means = {name: total(run, value).item() for name, value in sums.items()}
    return means | {"ratio_max_deviation": deviation}


def value_step(run: Run, value_model: ScalarModel, episodes: list[Episode]) -> float:
    """Accumulates the gradient of the clipped value loss over a minibatch, and returns the loss."""
    config: PPOConfig = run.config
    tokens = total(run, sum(len(episode.response) for episode in episodes)).item()
    loss_sum = 0.0
    for part in accumulate(run, value_model, forward_parts(run, episodes)):
        batch = unwrap(value_model).lay_out([e.prompt for e in part], [e.response for e in part])
        with run.accelerator.autocast():
            values = value_model(batch, batch.before)
        loss, _ = ppo_value_loss(
            values,
            torch.cat([episode.values for episode in part]),
            torch.cat([episode.returns for episode in part]),
            None,
            clip_range=config.value_clip_range,
        )
        share = len(batch.targets) / tokens
        run.accelerator.backward(loss * (share * run.accelerator.num_processes))
        loss_sum += loss.item() * share
    return total(run, loss_sum).item()


def check_ratio(iteration: int, deviation: float, mixed_precision: str) -> None:
    """Warns when π/π_old is not 1 before the first update: then the log-probs kept from sampling are wrong."""
    if deviation > RATIO_TOLERANCE[mixed_precision]:
        logger.warning(
            "iteration %d: the ratio π/π_old is off 1 by %.3g before any update (float rounding gives less than %g). "
            "The log-probs of the rollout are not those of the model in training, so PPO's clipping is off as well",
            iteration,
            deviation,
            RATIO_TOLERANCE[mixed_precision],
        )


@torch.no_grad()
def update_average(average: LanguageModel, policy: LanguageModel, decay: float) -> None:
    """Average ← decay · average + (1 − decay) · policy."""
    torch._foreach_lerp_(list(average.parameters()), list(policy.parameters()), 1 - decay)


def token_counts(prompts: list[list[int]], responses: list[list[int]]) -> list[int]:
    """Tokens of each prompt and response together."""
    return [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]


def forward_parts(run: Run, episodes: list[Episode]) -> list[list[Episode]]:
    """The episodes in groups of ``tokens_per_forward``."""
    lengths = token_counts([e.prompt for e in episodes], [e.response for e in episodes])
    return [[episodes[i] for i in part] for part in split(lengths, run.config.tokens_per_forward)]
