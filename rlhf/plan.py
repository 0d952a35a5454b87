"""What a run will take: bytes on each device by part, and how fast it can be, before any weights are read.

Sizes are those of the models' configurations, built without memory for their weights (torch's ``FakeTensorMode``). What
a block keeps for the backward pass is counted in a forward pass of such tensors, so every architecture is counted as it
is. (Of experts, up to twice as much is counted: torch can follow their matmul without memory in 16 bits alone.) Times
are bounds: floating-point operations over the device's rate, and in decoding the bytes of the weights over its
bandwidth.

    rlhf plan ppo --config 1.3b/ppo_ptx --policy gpt2 --reward_model gpt2 --devices 8 --tflops 400 --bandwidth 3000
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache

from rlhf import varlen
from rlhf.config import LengthConfig, PPOConfig, RewardConfig, RunConfig, SFTConfig
from rlhf.decoding import cache_argument
from rlhf.fields import first_line
from rlhf.loading import (
    ModelError,
    classifier_class,
    context_length,
    load_config,
    load_tokenizer,
    name_of,
    use_fused_gelu,
)
from rlhf.lora import add_adapter
from rlhf.models import OTHER_DROPOUT, RESIDUAL_DROPOUT, Backbone, LanguageModel, ScalarModel, set_dropout
from rlhf.ppo import value_source
from rlhf.processes import find_device
from rlhf.training import console

GPU_WORKSPACE = 768 << 20
"""What the ``linear_`` ops take on a GPU for the logits of some rows."""
GPU_CONTEXT = 1 << 30
"""What CUDA, its libraries and NCCL take on a GPU."""


@dataclass
class Passes:
    """What a forward pass over one token keeps or needs for a moment, in bytes."""

    kept_in_blocks: float
    """For the backward pass, by all blocks."""
    kept_outside: float
    largest: float
    """The largest tensor that a block keeps."""
    states: float
    """A row of hidden states."""

    def times(self, factor: float) -> Passes:
        """All of them, so many times as large."""
        return Passes(**{name: factor * size for name, size in vars(self).items()})


@dataclass
class Sizes:
    """A model, in numbers."""

    weights: int
    trained: int
    """Weights that are trained: all, an adapter's, or none."""
    largest_block: int
    outside: int
    """Weights outside of blocks: embeddings and head."""
    blocks: int
    width: int
    passes: Passes | None = None
    cache_bytes: int = 0
    """Keys and values of one token."""

    @property
    def matmul_weights(self) -> int:
        """Weights that every token is multiplied with."""
        return self.weights - self.outside


@dataclass
class Plan:
    """What a run takes on each device."""

    parts: dict[str, float] = field(default_factory=dict)
    """Bytes that are held all the time."""
    moments: dict[str, float] = field(default_factory=dict)
    """Bytes on top of those, while something is done."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of one step or iteration, at least."""
    tokens: float = 0.0
    """In a step or iteration, in all processes."""

    @property
    def peak(self) -> float:
        """The most bytes at any moment."""
        return sum(self.parts.values()) + max(self.moments.values())


def measure(
    kind: type[Backbone], source: Any, config: RunConfig, *, trained: bool, rows: int, length: int, dropout: float = 0.0
) -> Sizes:
    """The sizes of a model, and what a pass over ``rows`` sequences of ``length`` tokens keeps."""
    settings = load_config(source)
    set_dropout(settings, (*OTHER_DROPOUT, *RESIDUAL_DROPOUT), 0.0)
    set_dropout(settings, [name for name in RESIDUAL_DROPOUT if hasattr(settings, name)][:1], dropout)
    auto: Any = AutoModelForCausalLM
    if kind is ScalarModel:
        settings.num_labels = 1
        auto = classifier_class(settings)
    with torch.device("meta"):
        # It keeps what SDPA keeps, and runs on nothing that passes for a CPU.
        attention = "sdpa" if config.attention == varlen.NAME else config.attention
        model = kind.outline(auto.from_config(settings, attn_implementation=attention, dtype=torch.float32))
        use_fused_gelu(model)
        whole = sum(p.numel() for p in model.parameters())
        in_blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        if trained and config.lora.rank:
            add_adapter(model, config.lora, source, merged=True)
    model.train(dropout > 0)
    sizes = Sizes(
        weights=whole,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad) if trained else 0,
        largest_block=max(in_blocks),
        outside=whole - sum(in_blocks),
        blocks=len(in_blocks),
        width=settings.get_text_config().hidden_size,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            make_fake(model, torch.float32)
            sizes.passes = count_passes(model, config, rows, length)
        except RuntimeError:  # experts' grouped matmul, of whose shapes torch knows only those in 16 bits
            make_fake(model, torch.bfloat16)
            try:
                sizes.passes = count_passes(model, config, rows, length).times(2)
            except RuntimeError as error:
                raise ModelError(
                    f"{name_of(source)}: what its passes keep can't be counted: {first_line(error)}"
                ) from error
        if kind is LanguageModel:
            sizes.cache_bytes = count_cache(model, config)
    return sizes


def make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives a model without memory, on the meta device, tensors that have none either, but pass for a CPU's."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in seen:
                empty = torch.empty(parameter.shape, dtype=dtype)
                seen[id(parameter)] = parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, seen[id(parameter)][1])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def count_passes(model: Backbone, config: RunConfig, rows: int, length: int) -> Passes:
    """What a pass keeps for the backward pass, counted in one."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[int, bool, Any]] = {}
    depth = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept.setdefault(storage._cdata, (storage.nbytes(), depth > 0, storage))
        return tensor

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    for block in model.blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    ids = torch.zeros(rows, length, dtype=torch.long)
    with autocast(config), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.inner(input_ids=ids, use_cache=False).last_hidden_state
    tokens = rows * length
    inside = [size for size, in_block, _ in kept.values() if in_block]
    return Passes(
        kept_in_blocks=sum(inside) / tokens,
        kept_outside=sum(size for size, in_block, _ in kept.values() if not in_block) / tokens,
        largest=max(inside, default=0) / tokens,
        states=states.element_size() * states.shape[-1],
    )


def autocast(config: RunConfig) -> torch.autocast:
    """The precision of the run's activations."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def count_cache(model: Backbone, config: RunConfig) -> int:
    """Bytes of keys, values and states per token, of a prompt of 8."""
    cache = DynamicCache(config=model.model.config)
    with torch.no_grad(), autocast(config), contextlib.suppress(AttributeError):  # a cache of another kind: of states
        model.inner(
            input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=True, **{cache_argument(model.inner): cache}
        )
    found = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in found if tensor.dim() == 4 and tensor.shape[-2] == 8) // 8


def room(prompt: int, length: int) -> int:
    """Tokens for which a cache has room that began with a prompt and grew to a length."""
    end = prompt + max(prompt // 2, 16)
    while end < length:
        end = end + 1 + max((end + 1) // 2, 16)
    return end


@dataclass
class Machine:
    """A device, and how many of them there are."""

    devices: int
    flops: float
    """Operations a second of a matmul in the precision of the run."""
    bandwidth: float
    """Bytes a second."""
    memory: float
    """Bytes of each."""
    on_gpu: bool


def plan(config: RunConfig, machine: Machine) -> Plan:
    """Adds up the parts of a run of a stage."""
    found = Plan()
    if not machine.on_gpu:
        found.parts["Python and its libraries"] = psutil.Process().memory_info().rss
    else:
        found.parts["CUDA and its libraries"] = GPU_CONTEXT
    stages: dict[Any, Any] = {SFTConfig: plan_sft, RewardConfig: plan_reward, PPOConfig: plan_ppo}
    stages[type(config)](config, machine, found)
    return found


def rows_of(config: RunConfig, sequences: int, length: int) -> int:
    """Sequences in a forward pass."""
    return max(1, min(sequences, config.tokens_per_forward // length))


def length_of(lengths: LengthConfig, source: Any) -> int:
    """Tokens of a prompt with its response, at most."""
    return min(lengths.max_prompt_tokens + lengths.max_response_tokens, context_length(load_config(source)))


def plan_sft(config: SFTConfig, machine: Machine, found: Plan) -> None:
    """One model, trained."""
    length = max(
        length_of(config.lengths, config.model), config.pretraining_tokens if config.pretraining_fraction else 0
    )
    share = math.ceil(config.batch_size / machine.devices)
    rows = rows_of(config, share, length)
    model = measure(
        LanguageModel, config.model, config, trained=True, rows=rows, length=length, dropout=config.residual_dropout
    )
    add_trained(config, machine, found, "model", model)
    found.moments["training step"] = step_bytes(config, machine, model, rows * length, head=True)
    found.tokens = config.batch_size * length
    found.seconds["training"] = training_seconds(config, machine, model, found.tokens, length)


def plan_reward(config: RewardConfig, machine: Machine, found: Plan) -> None:
    """One model, trained; a comparison is counted with four completions, which share their prompt."""
    response = config.lengths.max_response_tokens
    length = length_of(config.lengths, config.model)
    comparison = length + 3 * min(response, length - 1)
    rows = rows_of(config, math.ceil(config.batch_size / machine.devices), comparison)
    model = measure(ScalarModel, config.model, config, trained=True, rows=4 * rows, length=length)
    add_trained(config, machine, found, "model", model)
    found.moments["training step"] = step_bytes(config, machine, model, rows * comparison, head=False)
    found.tokens = config.batch_size * comparison
    found.seconds["training"] = training_seconds(config, machine, model, found.tokens, length)


def plan_ppo(config: PPOConfig, machine: Machine, found: Plan) -> None:
    """Policy and value model, trained; reference, reward model and average."""
    length = length_of(config.lengths, config.policy)
    prompt = max(1, length - config.lengths.max_response_tokens)
    episodes = math.ceil(config.batch_size / machine.devices)
    rows = rows_of(config, math.ceil(config.minibatch_size / machine.devices), length)
    policy = measure(LanguageModel, config.policy, config, trained=True, rows=rows, length=length)
    try:
        source, _ = value_source(config, load_tokenizer(config.tokenizer or config.policy))
    except ModelError:  # a directory with a configuration alone
        source = config.value_model or config.reward_model or config.policy
    value = measure(ScalarModel, source, config, trained=True, rows=rows, length=length)
    scorers = {"value model": value, "reference": policy}
    add_trained(config, machine, found, "policy", policy)
    add_trained(config, machine, found, "value model", value)
    if not config.lora.rank:
        add_frozen(config, machine, found, "reference", policy)
    if config.reward_model:
        scorers["reward model"] = value
        if not config.lora.rank or source != config.reward_model:
            reward = measure(ScalarModel, config.reward_model, config, trained=False, rows=rows, length=length)
            scorers["reward model"] = reward
            add_frozen(config, machine, found, "reward model", reward)
    if config.ema_decay:
        found.parts["average of the policy"] = 4 * policy.trained / shards(config, machine)

    together = min(config.rollout_batch_size, episodes)
    assert policy.passes is not None
    cache = together * room(prompt, length) * policy.cache_bytes
    vocabulary = load_config(config.policy).get_text_config().vocab_size
    prefill = together * prompt * (2 * policy.passes.largest + 3 * policy.passes.states)
    logits = 3 * 4 * together * vocabulary
    free = machine.memory - sum(found.parts.values())
    whole = gathered(config, machine, policy, whole=True)
    name = "rollout"
    if whole > free / 2:
        name, whole = "rollout, gathering blocks for every token", gathered(config, machine, policy)
    found.moments[name] = whole + cache + max(prefill, logits)
    scored = rows_of(config, episodes, length) * length
    found.moments["scoring"] = max(
        gathered(config, machine, each) + scored * (2 * each.passes.largest + 3 * each.passes.states)
        for each in scorers.values()
        if each.passes
    )
    found.moments["policy step"] = step_bytes(config, machine, policy, rows * length, head=True)
    found.moments["value step"] = step_bytes(config, machine, value, rows * length, head=False)

    if config.gamma_ptx:
        chunks = math.ceil(config.minibatch_size * config.pretraining_per_episode / machine.devices)
        mixed = rows_of(config, chunks, config.pretraining_tokens) * config.pretraining_tokens
        found.moments["pretraining step"] = step_bytes(config, machine, policy, mixed, head=True)

    found.tokens = config.batch_size * length
    steps = math.ceil(episodes / together) * (length - prompt)
    decoding = steps * 4 * policy.weights / machine.bandwidth
    found.seconds["rollout"] = max(decoding, forward_flops(policy, episodes * length, length) / machine.flops)
    found.seconds["scoring"] = sum(
        forward_flops(each, episodes * length, length) / machine.flops for each in scorers.values()
    )
    trained = found.tokens * config.inner_epochs
    found.seconds["training"] = training_seconds(config, machine, policy, trained, length)
    found.seconds["training"] += training_seconds(config, machine, value, trained, length)
    if config.gamma_ptx:
        text = trained / length * config.pretraining_per_episode * config.pretraining_tokens
        found.seconds["pretraining mix"] = training_seconds(config, machine, policy, text, config.pretraining_tokens)


def shards(config: RunConfig, machine: Machine) -> int:
    """Into how many parts weights are split."""
    return machine.devices if config.sharding == "full" else 1


def frozen_width(config: RunConfig) -> int:
    """Bytes of a weight that is not trained."""
    return 2 if config.frozen_dtype == "bfloat16" else 4


def add_trained(config: RunConfig, machine: Machine, found: Plan, name: str, model: Sizes) -> None:
    """A trained model's weights, optimizer, and DDP's buckets."""
    frozen = model.weights if config.lora.rank else 0
    found.parts[f"{name}: weights"] = (frozen_width(config) * frozen + 4 * model.trained) / shards(config, machine)
    found.parts[f"{name}: Adam's averages"] = 8 * model.trained / shards(config, machine)
    if machine.devices > 1 and config.sharding == "none":
        found.parts[f"{name}: buckets of gradients"] = 4 * model.trained


def add_frozen(config: RunConfig, machine: Machine, found: Plan, name: str, model: Sizes) -> None:
    """The weights of a model that is not trained."""
    found.parts[f"{name}: weights"] = frozen_width(config) * model.weights / shards(config, machine)


def gathered(config: RunConfig, machine: Machine, model: Sizes, *, whole: bool = False) -> float:
    """Bytes of whole weights beside the parts, where weights are split: of two blocks and what is outside of them."""
    if shards(config, machine) == 1:
        return 0.0
    width = frozen_width(config) if model.trained < model.weights else 4
    return width * (model.weights if whole else model.outside + 2 * model.largest_block)


def step_bytes(config: RunConfig, machine: Machine, model: Sizes, tokens: int, *, head: bool) -> float:
    """Gradients and activations of a forward and backward pass, with what it needs for a moment."""
    passes = model.passes
    assert passes is not None
    in_blocks = passes.kept_in_blocks
    if config.gradient_checkpointing:
        in_blocks = model.blocks * passes.states + passes.kept_in_blocks / model.blocks
    moment = 2 * passes.largest + 2 * passes.states
    gradients = 4 * model.trained / shards(config, machine)
    workspace = GPU_WORKSPACE if machine.on_gpu and head else 0
    activations = tokens * (in_blocks + passes.kept_outside + moment)
    return gradients + gathered(config, machine, model) + activations + workspace


def forward_flops(model: Sizes, tokens: float, length: int) -> float:
    """Of the matmuls of weights, and of attention, which sees half of the tokens before."""
    return tokens * (2 * model.matmul_weights + 2 * model.blocks * length * model.width)


def training_seconds(config: RunConfig, machine: Machine, model: Sizes, tokens: float, length: int) -> float:
    """A forward pass, a backward pass of twice as much (with an adapter of once), and perhaps the forward again."""
    passes = 3 - (config.lora.rank > 0) + config.gradient_checkpointing
    return passes * forward_flops(model, tokens / machine.devices, length) / machine.flops


def measured_machine(devices: int, device: Any, dtype: torch.dtype) -> Machine:
    """This machine's device, tried for a second."""
    found = find_device(device)
    side = 8192 if found.type == "cuda" else 1024
    a = torch.randn(side, side, dtype=dtype, device=found)
    vector = torch.zeros(1 << 26, device=found)

    def seconds(call: Any) -> float:
        best = math.inf
        for _ in range(5):
            synchronize(found)
            begin = time.perf_counter()
            call()
            synchronize(found)
            best = min(best, time.perf_counter() - begin)
        return best

    flops = 2 * side**3 / seconds(lambda: a @ a)
    bandwidth = vector.nbytes / seconds(vector.sum)
    on_gpu = found.type == "cuda"
    memory = torch.cuda.mem_get_info(found)[1] if on_gpu else psutil.virtual_memory().total / devices
    return Machine(devices, flops, bandwidth, memory, on_gpu)


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(found: Plan, machine: Machine) -> None:
    """Prints the plan as a table."""
    table = Table("on each device", "GiB", title=f"{machine.devices} device(s)")
    for name, size in found.parts.items():
        table.add_row(name, f"{size / 2**30:,.2f}")
    moment = max(found.moments, key=found.moments.__getitem__)
    for name, size in found.moments.items():
        table.add_row(f"for a moment: {name}", f"{size / 2**30:,.2f}")
    table.add_row(f"[bold]peak, in the {moment}", f"[bold]{found.peak / 2**30:,.2f}", end_section=True)
    console.print(table)
    if found.peak > machine.memory:
        console.print(f"[bold]more than the {machine.memory / 2**30:,.0f} GiB that a device has")
    total = sum(found.seconds.values())
    parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in found.seconds.items())
    rates = f"{machine.flops / 1e12:,.3g} TFLOP/s and {machine.bandwidth / 1e9:,.4g} GB/s on each device"
    console.print(f"at most {found.tokens / total:,.0f} tokens a second in all ({parts}), at {rates}", soft_wrap=True)
