"""Step 3: reinforcement learning from the reward model (Ouyang et al. 2022, section 3.5, equation 2, appendix C.4).

    objective(φ) = E_(x,y)~π_φ^RL [ r_θ(x, y) − β log( π_φ^RL(y|x) / π^SFT(y|x) ) ] + γ E_x~D_pretrain [ log π_φ^RL(x) ]

maximised by PPO: γ = 0 is "PPO", γ > 0 is "PPO-ptx". Each iteration samples a batch of completions (a bandit: one
prompt, one completion, one reward at its end). Every token pays a KL penalty for its drift from the SFT model.
Advantages are estimated with a value model that started as the reward model. Then the policy is trained on the batch in
minibatches, by default in one pass, and the gradient of the pretraining loss is added in every minibatch. The saved
model is the moving average of the policy's weights.

    rlhf ppo --policy runs/sft/model --reward_model runs/reward/model --prompts prompts.jsonl --output_dir runs/ppo
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf import report
from rlhf.average import MovingAverage
from rlhf.batch import Batch, Group, groups_of_one
from rlhf.config import PPOConfig, warmup_from_tenth
from rlhf.data import Limits, PromptExample, read_prompts, tokenize_prompts
from rlhf.loading import (
    check_context,
    check_embedded,
    check_reward_config,
    check_same_tokenizer,
    end_token_ids,
    load_tokenizer,
    name_of,
    other_tokenizer,
    shared_context,
)
from rlhf.lora import without_adapter
from rlhf.models import Backbone, LanguageModel, ScalarModel, unwrap
from rlhf.paged import check_paged, sample_paged
from rlhf.rewards import RewardError, Rewards, load_functions, make_rewards
from rlhf.rollout import NotFiniteError, sample
from rlhf.settings import check
from rlhf.sft import language_model_step, pretraining_examples, pretraining_texts
from rlhf.sharding import Passes
from rlhf.training import (
    Run,
    RunError,
    accumulate,
    backward,
    batch_indices,
    make_optimizer,
    optimizer_step,
)
from rlhf_kernels import linear_ppo_policy_loss, linear_selective_log_softmax, ppo_advantages, ppo_value_loss

logger = logging.getLogger(__name__)

# How far exp(log π − log π_old) may be from 1 before any update. The sampler and the trainer compute the same number in
# different ways, so rounding differs. A larger deviation means that they do not compute the same thing.
RATIO_TOLERANCE = {"no": 1e-3, "bf16": 0.2, "fp16": 0.05}


@dataclass(frozen=True)
class Episode:
    """A prompt, its completion, and what PPO needs for each of its tokens. Tensors are (len(response),) float32."""

    prompt: list[int]
    response: list[int]
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def group(self) -> Group:
        """The prompt and the completion as a batch takes them."""
        return Group(self.prompt, [self.response])

    @property
    def idle(self) -> Episode:
        """An episode with nothing to learn, for a process that only takes part."""
        none = self.logprobs[:0]
        return Episode(self.prompt[:1], [], none, none, none, none)


@dataclass(frozen=True)
class Actors:
    """The models of PPO, and its rewards."""

    policy: LanguageModel
    value: ScalarModel
    reference: LanguageModel
    rewards: Rewards


def train(config: PPOConfig, *, resume: bool = False) -> Path:
    """Optimises ``config.policy`` against its rewards and returns the directory of the result."""
    functions = load_functions(config)
    if config.rollout == "paged":
        check_paged()
    records = read_prompts(config.prompts)
    texts = pretraining_texts(config.pretraining_data, "gamma_ptx", config.gamma_ptx)
    tokenizer = load_tokenizer(config.tokenizer or config.policy)
    if config.reward_model is not None:
        check_reward_config(config.reward_model)
    source, reader = value_source(config, tokenizer)
    check_same_tokenizer(tokenizer, name_of(config.tokenizer or config.policy), source)
    sharing = config.policy, None if reader else config.reward_model, source  # the same tokens
    context = shared_context(*sharing)
    prompts = tokenize_prompts(records, tokenizer, Limits(**asdict(config.lengths), context_length=context))
    if texts:
        check_context("pretraining_tokens", config.pretraining_tokens, config.policy)
    pretraining = pretraining_examples(texts, tokenizer, config.pretraining_tokens) if texts else []
    groups = [each.group for each in prompts] + [each.group for each in pretraining]
    check_embedded(tokenizer, groups, *sharing)

    run = Run("ppo", config, resume=resume)
    if run.finished:
        return run.directory / "model"
    processes, size = run.processes.count, config.minibatch_size
    check(size % processes == 0, "minibatch_size", size, f"a multiple of the {processes} processes")
    options: Any = {"attention": config.attention, "device": run.device}
    policy = LanguageModel.load(config.policy, **options).eval()  # no dropout: ratios start at 1
    # With an adapter the policy is its own reference, and the value model the reward model: each without the adapter.
    adapted = config.lora.rank > 0
    reference = None if adapted else run.place_frozen(copy.deepcopy(policy))
    policy = run.place_trained(policy, config.policy)
    average = MovingAverage(policy, config.ema_decay) if config.ema_decay else None
    reward_model = None
    if config.reward_model and not (adapted and source == config.reward_model):
        reward_model = run.place_frozen(ScalarModel.load(config.reward_model, **options).eval())
    value = run.place_trained(ScalarModel.load(source, **options).eval(), source, merged=True)
    if config.reward_model and not reward_model:
        reward_model = value
    ends = end_token_ids(config.policy, tokenizer)
    rewards = make_rewards(config, reward_model, functions, tokenizer, ends, reader)
    policy, policy_optimizer, value, value_optimizer = run.prepare(
        (policy, make_optimizer(policy, config.adam)),
        (value, make_optimizer(value, config.value_adam)),
        also=[average] if average else [],
    )
    actors = Actors(policy, value, reference or unwrap(policy), rewards)

    # With an adapter on weights in 16 bits, activations are in 16 bits as well.
    precision = "bf16" if adapted and config.frozen_dtype == "bfloat16" else config.mixed_precision
    iterations = config.episodes // config.batch_size
    for iteration in run.steps(iterations, unit="iterations"):
        chosen = batch_indices(len(prompts), config.batch_size, iteration, seed=config.seed)
        numbers = list(range(iteration * config.batch_size, (iteration + 1) * config.batch_size))
        episodes, metrics = collect(run, actors, [prompts[i] for i in chosen], numbers)
        factor = warmup_from_tenth(iteration, config.warmup_iterations)

        minibatches = config.batch_size // config.minibatch_size * config.inner_epochs
        for number in range(minibatches):
            picked = batch_indices(len(episodes), config.minibatch_size, number, seed=iteration)
            minibatch = run.processes.share([episodes[i] for i in picked])
            stats = policy_step(run, policy, minibatch)
            if number == 0:
                metrics["ratio_max_deviation"] = max(run.processes.joined([stats["ratio_max_deviation"]]))
                check_ratio(iteration, metrics["ratio_max_deviation"], precision)
            if config.gamma_ptx:
                chunks = batch_indices(
                    len(pretraining),
                    config.minibatch_size * config.pretraining_per_episode,
                    iteration * minibatches + number,
                    seed=config.seed,
                )
                # Its gradient adds to the policy loss's before the one optimizer step (C.4).
                stats["pretraining_loss"] = language_model_step(
                    run, policy, run.processes.share([pretraining[i] for i in chunks]), weight=config.gamma_ptx
                )
            run.require_finite(**{name: stats[name] for name in ("policy_loss", "pretraining_loss") if name in stats})
            stats["gradient_norm"] = optimizer_step(run, policy, policy_optimizer, config.adam, factor)
            if average:
                average.update()

            stats["value_loss"] = value_step(run, value, minibatch)
            run.require_finite(value_loss=stats["value_loss"])
            optimizer_step(run, value, value_optimizer, config.value_adam, factor)
            for name, each in stats.items():
                if name != "ratio_max_deviation":
                    metrics[name] = metrics.get(name, 0.0) + each / minibatches

        metrics["learning_rate"] = config.adam.learning_rate * factor
        run.log(iteration, metrics, show=["reward", "kl", "pretraining_loss"])
        if config.keep_every and (iteration + 1) % config.keep_every == 0:
            save_policy(run, policy, average, tokenizer, f"iteration-{iteration + 1:06d}")

    rows = {"episodes": iterations * config.batch_size, "iterations": iterations, "β": config.kl_coefficient}
    rows |= {"γ_ptx": config.gamma_ptx}
    if run.history:
        tail = run.history[-max(1, iterations // 10) :]
        mean = {name: sum(record[name] for record in tail) / len(tail) for name in ("reward", "kl", "response_tokens")}
        rows |= {
            "reward, first iteration": run.history[0]["reward"],
            "reward, last tenth": mean["reward"],
            f"KL to the SFT model by {config.kl_estimator}, last tenth (nats per completion)": mean["kl"],
            "response tokens, last tenth": mean["response_tokens"],
            "largest deviation of the ratio from 1 before an update": max(
                record["ratio_max_deviation"] for record in run.history
            ),
        }
    curves = [["reward"], ["kl"], ["entropy"], ["value_loss"], ["response_tokens"], ["pretraining_loss"]]
    report.write(run, "PPO-ptx" if config.gamma_ptx else "PPO", rows, curves)
    run.save_model(unwrap(value), tokenizer, "value", merged=True)  # for a further run to start from
    path = save_policy(run, policy, average, tokenizer, "model")
    run.close()
    return path


def value_source(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """What the value model starts from, and the reward model's tokenizer where it is not the policy's.

    Without a reward model that has the policy's tokens, it is the policy's backbone under a head of zeros.
    """
    reader = None if config.reward_model is None else other_tokenizer(tokenizer, config.reward_model)
    return config.value_model or (config.policy if reader else config.reward_model) or config.policy, reader


def save_policy(
    run: Run, policy: LanguageModel, average: MovingAverage | None, tokenizer: PreTrainedTokenizerBase, name: str
) -> Path:
    """Writes the moving average of the policy, or the policy itself if there is none, and returns where."""
    with average.in_place() if average else contextlib.nullcontext():
        return run.save_model(unwrap(policy), tokenizer, name)


@torch.no_grad()
def collect(
    run: Run, actors: Actors, examples: list[PromptExample], numbers: Sequence[int]
) -> tuple[list[Episode], dict[str, float]]:
    """Samples a completion for every prompt and works out its rewards and advantages. Each model runs once.

    ``numbers`` are those of the episodes in the run: an episode is the same however they are shared out. Each process
    samples and scores its share. Then all of them have all episodes.
    """
    config: PPOConfig = run.config
    examples, numbers = run.processes.share(examples), run.processes.share(numbers)
    prompts = [example.prompt_ids for example in examples]
    ends = actors.rewards.end_token_ids
    try:
        options: Any = {
            "end_token_ids": ends,
            "max_new_tokens": config.lengths.max_response_tokens,
            "temperature": config.temperature,
            "batch_size": config.rollout_batch_size,
        }
        with run.accelerator.autocast():
            if config.rollout == "paged":
                completions = sample_paged(actors.policy, prompts, seed=torch.initial_seed(), **options)
            else:
                completions = sample(actors.policy, prompts, seed=config.seed, streams=numbers, **options)
    except NotFiniteError:
        run.require_finite(logit_of_the_policy=float("nan"))
    responses = [completion.tokens for completion in completions]

    groups = groups_of_one(prompts, responses)
    laid_out: dict[Any, list[Batch]] = {}

    def each(model: Any, groups: list[Group], read: Callable[[Any, Batch], Tensor], *, trained: bool = False) -> Tensor:
        """Lays the completions out in batches for ``model`` and joins what ``read`` returns for each batch."""
        inner: Backbone = unwrap(model)
        if (key := (inner.layout, id(groups))) not in laid_out:
            laid_out[key] = list(inner.batches(groups, config.tokens_per_forward))
        adapter = contextlib.nullcontext() if trained else without_adapter(inner.model)
        with adapter, Passes(inner) as passes, run.accelerator.autocast():
            return torch.cat([passes(read, inner, batch) for batch in laid_out[key]])

    ref_logprobs = each(
        actors.reference,
        groups,
        lambda model, batch: model.forward(batch, linear_selective_log_softmax, temperature=config.temperature),
    )
    value = each(actors.value, groups, lambda model, batch: model.forward(batch, batch.before), trained=True)
    rewards = actors.rewards
    scores = None
    try:
        if rewards.model:
            read = groups if rewards.reader is None else rewards.groups(examples, responses)
            scores = each(rewards.model, read, lambda model, batch: model.forward(batch, batch.last))
        score = rewards.total(scores, examples, responses)
    except RewardError as error:
        raise RunError(f"step {run.step}: {error}; {run.last_checkpoint()}") from error

    # Advantages are normalised over the whole batch, and minibatches are drawn from it, on any number of processes.
    sizes = [len(response) for response in responses]
    per_token = [tensor.cpu().split(sizes) for tensor in (ref_logprobs, value)]
    kept = [completion.logprobs for completion in completions]
    shares = list(zip(prompts, responses, kept, *per_token, score.tolist(), strict=True))
    columns: Any = zip(*run.processes.joined(shares), strict=True)
    prompts, responses, *per_token, scores = columns
    logprobs, ref_logprobs, value = (torch.cat(tensors) for tensors in per_token)
    run.require_finite(
        log_probability_of_the_reference=ref_logprobs.sum().item(), value_of_the_value_model=value.sum().item()
    )
    logprobs, ref_logprobs, value = (tensor.to(run.device) for tensor in (logprobs, ref_logprobs, value))
    ended = torch.tensor([response[-1] in ends for response in responses], device=run.device)
    score = torch.tensor(scores, device=run.device) - config.missing_eos_penalty * ~ended

    # One flat entry per response token, completion after completion; cu_seqlens says where each begins.
    lengths = torch.tensor([len(response) for response in responses])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(run.device)
    advantages, returns, _, kl = ppo_advantages(
        score,
        logprobs,
        ref_logprobs,
        value,
        None,
        beta=config.kl_coefficient,
        estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=config.lam,
        whiten=config.whiten_advantages,
        cu_seqlens=cu_seqlens,
    )
    parts = [tensor.split(lengths.tolist()) for tensor in (logprobs, value, advantages, returns)]
    episodes = [Episode(*each) for each in zip(prompts, responses, *parts, strict=True)]
    sums = {"reward": score.sum(), "kl": kl.sum(), "response_tokens": lengths.sum(), "ended": ended.sum()}
    return episodes, {name: (total / len(episodes)).item() for name, total in sums.items()}


def policy_step(run: Run, policy: LanguageModel, episodes: list[Episode]) -> dict[str, float]:
    """Accumulates the gradient of the clipped policy loss over a minibatch, and returns its statistics."""
    config: PPOConfig = run.config
    tokens = run.processes.sum(sum(len(episode.response) for episode in episodes)).item()
    sums: dict[str, float] = {}
    deviation = 0.0
    for part, batch in accumulate(run, policy, episodes):
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
        backward(run, loss, share)
        deviation = max(deviation, stats["ratio_max_deviation"].item())
        for name, value in {"policy_loss": loss, **stats}.items():
            sums[name] = sums.get(name, 0.0) + value.item() * share
    means = {name: run.processes.sum(value).item() for name, value in sums.items()}
    return means | {"ratio_max_deviation": deviation}


def value_step(run: Run, value_model: ScalarModel, episodes: list[Episode]) -> float:
    """Accumulates the gradient of the clipped value loss over a minibatch, and returns the loss."""
    config: PPOConfig = run.config
    tokens = run.processes.sum(sum(len(episode.response) for episode in episodes)).item()
    loss_sum = 0.0
    for part, batch in accumulate(run, value_model, episodes):
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
        backward(run, loss, share)
        loss_sum += loss.item() * share
    return run.processes.sum(loss_sum).item()


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
