"""Every setting of every stage, with the paper's value as its default.

Section numbers are those of Ouyang et al. 2022 (arXiv 2203.02155). ``docs/recipe.md`` lists all of them with the
paper's words; ``rlhf/recipes`` holds them per model size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rlhf.objects import Data, Functions, Judge, Model, Models, Tokenizer
from rlhf.settings import Settings, check


@dataclass
class Adam(Settings):
    """The optimizer. The paper (appendix C) gives the betas and, per stage, the learning rate."""

    learning_rate: float = 1e-5
    """Peak learning rate. Each stage has its own."""
    beta1: float = 0.9
    """Decay of the gradient's running mean (C)."""
    beta2: float = 0.95
    """Decay of the gradient's running square (C)."""
    eps: float = 1e-8
    """Added to the denominator. Not in the paper."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it. Not in the paper's appendix on fine-tuning; GPT-3's value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        check(0 <= self.beta1 < 1, "beta1", self.beta1, "in [0, 1)")
        check(0 <= self.beta2 < 1, "beta2", self.beta2, "in [0, 1)")
        check(self.eps > 0, "eps", self.eps, "above 0")
        check(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")


@dataclass
class LoRA(Settings):
    """An adapter of low rank instead of training all weights (Hu et al. 2021). Not in the paper."""

    rank: int = 0
    """Rank of the change of each weight. 0: no adapter, all weights are trained."""
    alpha: float | None = None
    """The change is multiplied by alpha / rank; by default twice the rank."""
    dropout: float = 0.0
    """Dropout before the adapter, in SFT; the other stages use none."""
    target_modules: list[str] | str = "all-linear"
    """Which layers have one: names or a regular expression as peft takes them; all-linear is all but the head."""
    merge: bool = False
    """Save the whole model with the change in its weights, and not the adapter alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rank >= 0, "rank", self.rank, "at least 0")
        check(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "above 0")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        check(bool(self.target_modules), "target_modules", self.target_modules, "all-linear, or names of layers")


@dataclass
class RunConfig(Settings):
    """What every training stage shares."""

    output_dir: str
    """The run's directory: config, metrics, checkpoints, the trained model and a report."""
    seed: int = 0
    """Seeds data order, dropout and sampling."""
    checkpoint_every: int = 100
    """Steps (PPO: iterations) between checkpoints. A killed run resumes from the last one with --resume."""
    tokens_per_forward: int = 16384
    """Tokens in one forward pass, which bounds memory. Larger batches accumulate gradients, with the same result."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of activations; weights stay in float32 (the paper, C: fp16 with fp32 master copies)."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block for the backward pass, which runs the block again: up to a third more time and
    much less memory. The result is the same."""
    sharding: Literal["none", "full"] = "none"
    """How several processes hold the models: none: each of them whole; full: each its part of every weight, of all
    models, gathered block by block when a model runs."""
    lora: LoRA = field(default_factory=LoRA)
    """An adapter that is trained instead of all weights."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights that are not trained: PPO's reference and reward model, and all but the adapter with
    lora.rank."""
    attention: str | None = None
    """Attention implementation of transformers. On a GPU also flash_attention_2 where flash-attn is installed,
    flex_attention, or torch's own varlen_attn, in 16 bits. By default sdpa for models that have it, else eager."""
    liger: bool = False
    """Liger's fused norms, rotary embeddings and MLPs in all models, on a GPU where liger-kernel is installed."""
    tokenizer: Tokenizer | None = None
    """The tokenizer, by default the one beside the model."""
    device: str | None = None
    """cpu, cuda, ...; by default the best there is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output_dir(self.output_dir)
        check(self.checkpoint_every > 0, "checkpoint_every", self.checkpoint_every, "at least 1")
        frozen = self.lora.rank > 0 or isinstance(self, PPOConfig)
        in_16_bits = self.attention != "varlen_attn" or self.mixed_precision != "no"
        check(in_16_bits, "mixed_precision", self.mixed_precision, "bf16 or fp16 where attention is varlen_attn")
        check(frozen or self.frozen_dtype == "float32", "frozen_dtype", self.frozen_dtype, "float32 without lora.rank")
        check(self.tokens_per_forward > 0, "tokens_per_forward", self.tokens_per_forward, "at least 1")


@dataclass
class LengthConfig(Settings):
    """Limits on tokens (C): prompts over 1k are dropped, answers capped at 1k."""

    max_prompt_tokens: int = 1024
    """Longer prompts are dropped, with a count."""
    max_response_tokens: int = 1024
    """Longer answers are cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.max_prompt_tokens > 0, "max_prompt_tokens", self.max_prompt_tokens, "at least 1")
        check(self.max_response_tokens > 0, "max_response_tokens", self.max_response_tokens, "at least 1")


@dataclass
class SFTConfig(RunConfig):
    """Supervised fine-tuning on demonstrations (section 3.5, appendix C.1)."""

    model: Model = ""
    """The pretrained causal LM to start from: a directory or a hub name."""
    data: Data = field(default_factory=list)
    """Demonstrations: JSONL, Parquet or hub data sets with {"prompt", "completion"} or {"messages"}."""
    held_out_fraction: float = 0.0
    """Share of the demonstrations kept for the validation loss."""
    epochs: int = 16
    """Passes over the demonstrations (C.1: 16; C.3: 2 for the model that PPO starts from)."""
    batch_size: int = 32
    """Sequences per step: demonstrations and pretraining text (C.1: 32; 8 for 175B)."""
    residual_dropout: float = 0.2
    """Dropout on the output of every block (C.1)."""
    adam: Adam = field(default_factory=lambda: Adam(learning_rate=9.65e-6))
    """The optimizer (C.1: learning rate 9.65e-6 for 1.3B and 6B, 5.03e-6 for 175B); cosine decay to 10 %."""
    lengths: LengthConfig = field(default_factory=LengthConfig)
    """Limits on tokens."""
    pretraining_data: Data = field(default_factory=list)
    """Pretraining text to mix in: {"text"} records or plain text files."""
    pretraining_fraction: float = 0.0
    """Share of each batch that is pretraining text (C.3: 0.1 for the model that PPO starts from)."""
    pretraining_tokens: int = 1024
    """Length of the chunks that pretraining text is cut into."""
    keep_every: int = 0
    """Also keep the model every so many steps. The paper takes the one that the reward model likes best on a validation
    set (C.1), which `rlhf evaluate --model 'RUN/step-*'` says. 0: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.model), "model", self.model, "a directory or a hub name")
        check(bool(self.data), "data", self.data, "at least one file or data set")
        check(0 <= self.held_out_fraction < 1, "held_out_fraction", self.held_out_fraction, "in [0, 1)")
        check(self.epochs > 0, "epochs", self.epochs, "at least 1")
        check(self.keep_every >= 0, "keep_every", self.keep_every, "at least 0")
        check(self.batch_size > 0, "batch_size", self.batch_size, "at least 1")
        check(0 <= self.residual_dropout < 1, "residual_dropout", self.residual_dropout, "in [0, 1)")
        check(0 <= self.pretraining_fraction < 1, "pretraining_fraction", self.pretraining_fraction, "in [0, 1)")
        if self.pretraining_fraction:
            mixed = max(1, round(self.batch_size * self.pretraining_fraction))
            check(mixed < self.batch_size, "batch_size", self.batch_size, f"above the {mixed} of pretraining text")
        check_pretraining(
            self.pretraining_fraction, "pretraining_fraction", self.pretraining_data, self.pretraining_tokens
        )


@dataclass
class RewardConfig(RunConfig):
    """Reward modelling from ranked completions (section 3.5, equation 1, appendix C.2)."""

    model: Model = ""
    """The model to start from, the SFT model in the paper: a new head of one label replaces its unembedding."""
    data: Data = field(default_factory=list)
    """Comparisons: {"prompt", "completions", "ranks"} or {"prompt", "chosen", "rejected"}."""
    held_out_fraction: float = 0.0
    """Share of the prompts kept for the accuracy on held-out rankings."""
    demonstrations: Data = field(default_factory=list)
    """Demonstrations whose mean score becomes 0 after training (3.5). Without them the bias stays as trained."""
    epochs: int = 1
    """Passes over the comparisons (C.2; more overfit)."""
    batch_size: int = 64
    """Prompts per step, each with all its C(K, 2) pairs (C.2: up to 2,304 pairs)."""
    adam: Adam = field(default_factory=lambda: Adam(learning_rate=9e-6))
    """The optimizer (C.2); cosine decay to 10 %."""
    lengths: LengthConfig = field(default_factory=LengthConfig)
    """Limits on tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.model), "model", self.model, "a directory or a hub name")
        check(bool(self.data), "data", self.data, "at least one file or data set")
        check(0 <= self.held_out_fraction < 1, "held_out_fraction", self.held_out_fraction, "in [0, 1)")
        check(self.epochs > 0, "epochs", self.epochs, "at least 1")
        check(self.batch_size > 0, "batch_size", self.batch_size, "at least 1")


@dataclass
class PPOConfig(RunConfig):
    """Reinforcement learning from the reward model: PPO, and PPO-ptx with gamma_ptx > 0 (equation 2, C.4)."""

    policy: Model = ""
    """The SFT model: the policy starts from it, and the KL penalty is measured against it."""
    reward_model: Model | None = None
    """The reward model. The value model starts from it as well (C.4). Where its tokenizer is not the policy's, it reads
    the text, and the value model starts from the policy's backbone."""
    reward: Functions = field(default_factory=list)
    """Rewards in Python, `module:function`. A function gets the lists prompts and completions and one list for each
    further field of the records, all as keyword arguments. It returns a number for every completion. Not in the
    paper."""
    reward_weights: list[float] | None = None
    """The factor of each reward in their sum: first the reward model's, then the functions'. By default 1. Not in the
    paper."""
    value_model: Model | None = None
    """What the value model starts from instead of the reward model, for example output_dir/value of an earlier run. A
    language model gets a new head of zeros."""
    prompts: Data = field(default_factory=list)
    """Prompts: {"prompt"} records."""
    episodes: int = 256_000
    """Completions sampled in the whole run (C.4)."""
    batch_size: int = 512
    """Episodes per iteration (C.4)."""
    minibatch_size: int = 64
    """Episodes per optimizer step (C.4)."""
    inner_epochs: int = 1
    """Passes over each batch (C.4)."""
    kl_coefficient: float = 0.02
    """β: the price of each nat of log π_RL/π_SFT, per token (C.4). 0: no penalty."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """How the KL of a token is estimated; k1 is equation 2's log-ratio."""
    gamma: float = 1.0
    """Discount γ of the advantage estimate (C.4: none)."""
    lam: float = 0.95
    """λ of generalized advantage estimation. Not in the paper; as in Stiennon et al. 2020."""
    whiten_advantages: bool = True
    """Normalise advantages over the batch. Not in the paper; as in the code of Ziegler et al. 2019."""
    clip_range: float = 0.2
    """PPO's clip ratio (C.4)."""
    value_clip_range: float | None = 0.2
    """How far a value may move from the old one before it is clipped. Not in the paper; as in Ziegler et al. 2019.
    null: no clipping."""
    temperature: float = 1.0
    """Sampling temperature (C.4)."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a completion that max_response_tokens cut off. Not in the paper."""
    warmup_iterations: int = 10
    """Iterations over which both learning rates rise from a tenth of the peak; constant after (C.4)."""
    adam: Adam = field(default_factory=lambda: Adam(learning_rate=5e-6, eps=1e-5))
    """The policy's optimizer. The paper swept the learning rate (E.9), so this value is a choice, as is eps."""
    value_adam: Adam = field(default_factory=lambda: Adam(learning_rate=9e-6, eps=1e-5))
    """The value model's optimizer (C.4: learning rate 9e-6; 5e-6 for the 175B policy)."""
    ema_decay: float = 0.992
    """Decay of the moving average of the policy's weights, per optimizer step; the average is what is kept (C.4).
    0: the policy itself is kept, which saves the memory of a model."""
    gamma_ptx: float = 0.0
    """γ of equation 2: weight of the language-modelling loss on pretraining text (C.4: 27.8). 0: plain PPO."""
    pretraining_data: Data = field(default_factory=list)
    """Pretraining text for gamma_ptx > 0: {"text"} records or plain text files."""
    pretraining_per_episode: int = 8
    """Pretraining sequences per episode (C.4)."""
    pretraining_tokens: int = 1024
    """Length of the chunks that pretraining text is cut into."""
    lengths: LengthConfig = field(default_factory=LengthConfig)
    """Limits on tokens."""
    rollout: Literal["loop", "paged"] = "loop"
    """How completions are sampled: loop: token by token, to the same bits on any number of processes; paged: by
    transformers' continuous batching, made for GPUs, whose draws are not reproducible to the bit."""
    rollout_batch_size: int = 512
    """Completions sampled at a time, which bounds the memory of the key-value cache."""
    keep_every: int = 0
    """Also keep the policy's averaged weights every so many iterations, to study the course of training. 0: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.policy), "policy", self.policy, "a directory or a hub name")
        functions = self.reward if isinstance(self.reward, list) else [self.reward]
        self.reward = functions
        check(bool(self.reward_model or functions), "reward_model", self.reward_model, "given, or reward")
        rewards = (self.reward_model is not None) + len(functions)
        weights = self.reward_weights
        check(weights is None or len(weights) == rewards, "reward_weights", weights, f"{rewards} weights, one a reward")
        check(self.missing_eos_penalty >= 0, "missing_eos_penalty", self.missing_eos_penalty, "at least 0")
        check(bool(self.prompts), "prompts", self.prompts, "at least one file or data set")
        for name in ("batch_size", "minibatch_size", "inner_epochs", "pretraining_per_episode", "rollout_batch_size"):
            check(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        check(self.episodes >= self.batch_size, "episodes", self.episodes, f"at least batch_size ({self.batch_size})")
        check(
            self.batch_size % self.minibatch_size == 0,
            "minibatch_size",
            self.minibatch_size,
            f"a divisor of batch_size ({self.batch_size})",
        )
        check(self.kl_coefficient >= 0, "kl_coefficient", self.kl_coefficient, "β ≥ 0")
        check(0 <= self.gamma <= 1, "gamma", self.gamma, "in [0, 1]")
        check(0 <= self.lam <= 1, "lam", self.lam, "in [0, 1]")
        check(0 < self.clip_range < 1, "clip_range", self.clip_range, "in (0, 1)")
        clip = self.value_clip_range
        check(clip is None or clip > 0, "value_clip_range", clip, "above 0, or null for no clipping")
        check(self.temperature > 0, "temperature", self.temperature, "above 0")
        check(self.rollout == "loop" or self.sharding == "none", "rollout", self.rollout, "loop with sharding full")
        check(self.warmup_iterations >= 0, "warmup_iterations", self.warmup_iterations, "at least 0")
        check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        check(self.gamma_ptx >= 0, "gamma_ptx", self.gamma_ptx, "γ ≥ 0")
        check(self.keep_every >= 0, "keep_every", self.keep_every, "at least 0")
        check_pretraining(self.gamma_ptx, "gamma_ptx", self.pretraining_data, self.pretraining_tokens)


@dataclass
class GenerateConfig(Settings):
    """Sample completions from a model."""

    model: Model
    """The causal LM: a directory or a hub name."""
    prompts: Data
    """{"prompt"} records."""
    output_dir: str
    """Where completions.jsonl goes: {"prompt", "completions"} records, ready to be ranked."""
    samples: int = 1
    """Completions per prompt (the paper's labellers ranked 4 to 9)."""
    temperature: float = 1.0
    """Sampling temperature; 0: always the likeliest token."""
    lengths: LengthConfig = field(default_factory=LengthConfig)
    """Limits on tokens."""
    seed: int = 0
    """Seeds sampling."""
    tokenizer: Tokenizer | None = None
    """The tokenizer, by default the one beside the model."""
    batch_size: int = 512
    """Completions sampled at a time."""
    sharding: Literal["none", "full"] = "none"
    """How several processes hold the model: none: each of them whole; full: each its part of every weight."""
    device: str | None = None
    """cpu, cuda, ...; by default the best there is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.model), "model", self.model, "a directory or a hub name")
        check(bool(self.prompts), "prompts", self.prompts, "at least one file or data set")
        check_output_dir(self.output_dir)
        check(self.samples > 0, "samples", self.samples, "at least 1")
        check(self.batch_size > 0, "batch_size", self.batch_size, "at least 1")
        check(self.temperature >= 0, "temperature", self.temperature, "at least 0")


@dataclass
class EvaluateConfig(Settings):
    """Compare models with a baseline: win rate under a judge, reward, KL and the alignment tax (section 4)."""

    model: Models
    """The model under test, or several. A pattern stands for all that it finds: 'runs/ppo/iteration-*'."""
    baseline: Model
    """The model they are compared with, the SFT model in the paper's Figure 1. Any of them may have another tokenizer,
    or be an encoder-decoder model."""
    output_dir: str
    """Where the report, the figures and every completion go."""
    prefix: list[str] | str | None = None
    """A file of text that goes before every prompt of the models, few-shot examples for instance; or one for each, ''
    for none."""
    baseline_prefix: str | None = None
    """The same for the baseline: the paper's prompted GPT-3."""
    prompts: Data = field(default_factory=list)
    """{"prompt"} records that no stage has trained on."""
    judge: Judge | None = None
    """Decides which completion is better: a reward model; a Python function `module:function` of (prompt, a, b) that
    returns 1 when a is better, 0 when b is and 0.5 when neither is; or a file of people's rankings of these
    completions, as `rlhf label` exports them. Without a judge there is no win rate."""
    pretraining_data: Data = field(default_factory=list)
    """Held-out pretraining text for the alignment tax: the rise of the model's loss over the baseline's."""
    pretraining_tokens: int = 1024
    """Length of the chunks that pretraining text is cut into."""
    tasks: list[str] | str = field(default_factory=list)
    """Benchmarks of lm-eval by name, for the alignment tax on them (4.2): squadv2,drop,hellaswag for instance."""
    tasks_dir: str | None = None
    """A directory with definitions of further tasks."""
    temperature: float = 1.0
    """Sampling temperature."""
    lengths: LengthConfig = field(default_factory=LengthConfig)
    """Limits on tokens."""
    seed: int = 0
    """Seeds sampling."""
    tokenizer: Tokenizer | None = None
    """The tokenizer of all models; by default each has the one beside it."""
    batch_size: int = 512
    """Completions sampled at a time."""
    sharding: Literal["none", "full"] = "none"
    """How several processes hold the models: none: each of them whole; full: each its part of every weight."""
    tokens_per_forward: int = 16384
    """Tokens in one forward pass, which bounds memory."""
    device: str | None = None
    """cpu, cuda, ...; by default the best there is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "baseline"):
            check(bool(getattr(self, name)), name, getattr(self, name), "a directory or a hub name")
        check(self.judge is None or bool(self.prompts), "judge", self.judge, "null without prompts")
        check(self.tasks_dir is None or bool(self.tasks), "tasks_dir", self.tasks_dir, "null without tasks")
        check(self.baseline_prefix != "", "baseline_prefix", "", "a file, or null")
        check_output_dir(self.output_dir)
        given = self.prompts or self.pretraining_data or self.tasks
        check(bool(given), "prompts", self.prompts, "given, or pretraining_data or tasks")
        check(self.pretraining_tokens > 1, "pretraining_tokens", self.pretraining_tokens, "at least 2")
        check(self.tokens_per_forward > 0, "tokens_per_forward", self.tokens_per_forward, "at least 1")
        check(self.batch_size > 0, "batch_size", self.batch_size, "at least 1")
        check(self.temperature > 0, "temperature", self.temperature, "above 0")


@dataclass
class LabelConfig(Settings):
    """Serve a page on which people rank completions, say which they prefer, or write demonstrations (section 3.4)."""

    output_dir: str
    """Where labels.sqlite is, with the prompts and every answer. The same directory goes on with them."""
    data: Data = field(default_factory=list)
    """What is labelled: {"prompt", "completions"} records, or prompts for demonstrations. Needed the first time only;
    later it may have more records at its end."""
    task: Literal["ranking", "preference", "demonstration"] = "ranking"
    """ranking: marks, flags and ranks for all completions of a prompt; preference: the same for two, side by side;
    demonstration: an answer to the prompt."""
    labels_per_prompt: int = 1
    """How many labellers answer each prompt."""
    seed: int = 0
    """Seeds the order in which each labeller sees the completions of a prompt. That of the first start is kept."""
    host: str = "127.0.0.1"
    """The address to listen on. On another than this machine's own, the page asks for a token, which is printed."""
    port: int = 8000
    """The port to listen on. 0: any that is free."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output_dir(self.output_dir)
        check(self.labels_per_prompt > 0, "labels_per_prompt", self.labels_per_prompt, "at least 1")
        check(bool(self.host), "host", self.host, "an address")
        check(0 <= self.port < 65536, "port", self.port, "from 0 to 65535")


def check_output_dir(path: str) -> None:
    """Checks where to write. A shell leaves ``--output_dir=~/x`` as it is, and a directory "~" would be made."""
    check(bool(path), "output_dir", path, "a directory")
    check(not path.startswith("~"), "output_dir", path, "a directory with its home written out")


def check_pretraining(weight: float, name: str, data: Data, tokens: int) -> None:
    """Raises if there is a pretraining mix but no text, or if a chunk is too short to predict a token in it."""
    if weight > 0:
        check(bool(data), "pretraining_data", data, f"at least one file or data set when {name} is {weight}")
    check(tokens > 1, "pretraining_tokens", tokens, "at least 2")


def cosine_to_tenth(step: int, steps: int) -> float:
    """The factor on the learning rate at ``step`` of ``steps``: a half cosine from 1 down to 0.1 (C.1, C.2)."""
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / max(steps - 1, 1)))


def warmup_from_tenth(iteration: int, warmup: int) -> float:
    """The factor on the learning rate at ``iteration``: linear from 0.1 to 1 over ``warmup`` iterations (C.4)."""
    return min(1.0, 0.1 + 0.9 * iteration / warmup) if warmup else 1.0
