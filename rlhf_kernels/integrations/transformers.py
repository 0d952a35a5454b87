"""Log-probs of a Hugging Face causal language model's tokens, without its (tokens, V) logits.

The model's own ``forward`` runs, with all its wrappers (DDP, FSDP2, PEFT, gradient checkpointing). Only its output
projection is replaced while it does, by the ``linear_`` op: that is where the logits would have been made.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels import checks
from rlhf_kernels.integrations.common import fold_scale
from rlhf_kernels.linear_log_prob import linear_selective_log_softmax, linear_selective_log_softmax_and_entropy

# The names under which configurations keep the cap on the logits and the factors that the head's product is multiplied
# with or divided by: Gemma; Cohere, Falcon-H1 and others; Granite.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
DIVISOR_IS_FACTOR = ("hyperclovax",)
"""Types that multiply by what others divide by."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""The largest relative error that rounding may cause, by the precision of activations."""


class UnsupportedModelError(ValueError):
    """A model whose logits are not what this module takes them for."""


def log_probs(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
    logits_to_keep: int | None = None,
    temperature: float = 1.0,
    **inputs: Any,
) -> Tensor:
    """log p(token | the tokens before it) of every token but the first, as from ``log_softmax(model(...).logits / τ)``.

    Differentiable in the model's parameters. The first call with a model compares the logits of a few tokens with those
    of its own ``forward``.

    Args:
        model: a causal language model of transformers, plain or wrapped. Its head may be tied, have a bias, and carry a
            LoRA adapter of PEFT.
        input_ids: (B, T) int64 on the model's device, padded on either side, or packed.
        attention_mask: (B, T), or of another shape that the model takes; goes to the model. What a (B, T) one masks
            gives 0.
        position_ids: (B, T), or (3, B, T) as models of images have them; goes to the model. Where it is 0 a packed
            sequence begins, whose first token gives 0.
        mask: (B, T) bool or {0, 1}: the tokens whose log-probs are wanted, such as those of the response. Rows that
            count nowhere are not multiplied.
        logits_to_keep: k: only the last k tokens, k < T.
        temperature: τ > 0.
        inputs: more arguments for the model, such as ``pixel_values``.

    Returns:
        (B, T − 1) float32, or (B, k): entry t belongs to token t + 1 of the sequence; 0 where a token does not count.

    Raises:
        UnsupportedModelError: the model's logits can't be computed from its last hidden states; says why.
        TypeError: an argument is not a tensor of a dtype above.
        ValueError: shapes or devices differ, or an option is out of range.
    """
    where = {"attention_mask": attention_mask, "position_ids": position_ids}
    op = linear_selective_log_softmax
    return _run(op, model, input_ids, where, mask, logits_to_keep, temperature, inputs)[0]


def log_probs_and_entropy(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
    logits_to_keep: int | None = None,
    temperature: float = 1.0,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`log_probs`, and the entropy of each token's distribution from the same pass.

    Differentiable in both. Arguments and errors are those of :func:`log_probs`.

    Returns:
        Two tensors of the shape that :func:`log_probs` gives: log-probs and entropies, in nats.
    """
    where = {"attention_mask": attention_mask, "position_ids": position_ids}
    op = linear_selective_log_softmax_and_entropy
    logprobs, entropies = _run(op, model, input_ids, where, mask, logits_to_keep, temperature, inputs)
    return logprobs, entropies


@dataclass
class Head:
    """A model's output projection: logits = softcap·tanh((hidden · weightᵀ + bias) / softcap) / temperature."""

    module: Any
    """The module that multiplies when the model runs."""
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a causal language model of transformers, wrapped or not.

        Raises:
            UnsupportedModelError: it has none that is a linear layer.
        """
        causal = _unwrapped(model)
        name = type(causal).__name__
        embeddings = getattr(causal, "get_output_embeddings", lambda: None)()
        if embeddings is None:
            raise UnsupportedModelError(f"{name} has no output embeddings; it is no causal language model")
        config: Any = causal.config
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{name} has an encoder and a decoder; only decoders are served")
        module = active_head(embeddings)
        _check_linear_layer(module, name)
        softcap, temperature = logit_transform(config)
        return cls(module, softcap, temperature)

    @property
    def weight(self) -> Tensor:
        """(V, D), with what adapters add to it. Inside the module's ``forward``: elsewhere it may be a shard."""
        weight = _whole(getattr(self.module, "base_layer", self.module).weight)
        for adapter in self._adapters:
            weight = weight + self.module.get_delta_weight(adapter).to(weight.dtype)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """(V,), with what adapters add to it, or None."""
        bias = getattr(getattr(self.module, "base_layer", self.module), "bias", None)
        bias = None if bias is None else _whole(bias)
        for adapter in self._adapters:
            if (own := self.module.lora_B[adapter].bias) is not None:
                own = own * self.module.scaling[adapter]
                bias = own if bias is None else bias + own.to(bias.dtype)
        return bias

    @property
    def _adapters(self) -> list[str]:
        """Those that the module adds to its product when it runs."""
        if not hasattr(self.module, "base_layer") or self.module.disable_adapters or self.module.merged:
            return []
        return [adapter for adapter in self.module.active_adapters if adapter in self.module.lora_A]


def logit_transform(config: Any) -> tuple[float | None, float]:
    """The softcap and the temperature that a configuration gives the product of hidden states and output embeddings."""
    config = config.get_text_config()
    scale = next((s for s in (getattr(config, name, None) for name in FACTORS) if s is not None), 1.0)
    divisor = next((s for s in (getattr(config, name, None) for name in DIVISORS) if s is not None), 1.0)
    scale = scale * divisor if config.model_type in DIVISOR_IS_FACTOR else scale / divisor
    if not scale > 0:
        raise UnsupportedModelError(f"{config.model_type} models multiply their logits by {scale}; it must be above 0")
    softcap = next((c for c in (getattr(config, name, None) for name in SOFTCAPS) if c), None)
    return fold_scale(softcap, scale)


def transformed(product: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """(..., V) float32 logits, from the product of hidden states and output embeddings."""
    logits = product.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if temperature == 1 else logits / temperature


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual − expected| / |expected|; infinite where anything is not finite."""
    error = ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers inside wrappers of torch, DeepSpeed, accelerate and PEFT."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module) or (
            isinstance(inner := getattr(model, "module", None), nn.Module) and not hasattr(model, "config_class")
        ):
            model = inner
        elif callable(get := getattr(model, "get_base_model", None)):
            return get()
        else:
            return model


def active_head(embeddings: Any) -> Any:
    """The module that multiplies: PEFT keeps a trained copy beside the original."""
    copies = getattr(embeddings, "modules_to_save", None)
    if copies is None:
        return embeddings
    if embeddings.disable_adapters or not (names := [n for n in embeddings.active_adapters if n in copies]):
        return embeddings.original_module
    return copies[names[0]]


def _check_linear_layer(module: Any, name: str) -> None:
    if not hasattr(module, "base_layer"):
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            raise UnsupportedModelError(f"{name}: its head is a {type(module).__name__}, must be a torch.nn.Linear")
        return
    if not isinstance(module.base_layer, nn.Linear) or not hasattr(module, "lora_A"):
        kind = f"{type(module).__module__.rpartition('.')[0]}.{type(module).__name__}"
        raise UnsupportedModelError(f"{name}: its head is a {kind}, must be a torch.nn.Linear, or LoRA on one")
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    for adapter in active:
        if getattr(module, "use_dora", {}).get(adapter) or adapter in getattr(module, "lora_variant", {}):
            raise UnsupportedModelError(f"{name}: adapter {adapter!r} of its head is no plain LoRA")
        if module.training and getattr(module.lora_dropout[adapter], "p", 0.0) > 0:
            raise UnsupportedModelError(
                f"{name}: adapter {adapter!r} of its head has dropout, which a merged weight can't have; "
                "set lora_dropout=0, or leave the head out of target_modules"
            )


def _whole(weight: Any) -> Tensor:
    """A parameter as it is used: FSDP2 shows shards outside of ``forward``, DeepSpeed nothing."""
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor()
    if weight.numel() == 0 and hasattr(weight, "ds_id"):
        raise UnsupportedModelError("the head's weight is sharded by ZeRO-3 and was not gathered when the head ran")
    return weight


def _run(
    op: Callable[..., Any], model: nn.Module, input_ids: Tensor, where: dict[str, Tensor | None], mask: Tensor | None,
    logits_to_keep: int | None, temperature: float, inputs: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    """One pass through a model, with the op in the place of its head."""
    checks.tensor("input_ids", input_ids, checks.INDICES)
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: has shape {tuple(input_ids.shape)}, must be (B, T) with T at least 2")
    for argument in ("labels", "return_dict"):
        if inputs.get(argument) is not None:
            raise ValueError(f"{argument}: is given, must be left out; no logits are made, nor a loss of them")
    inputs = {name: x for name, x in inputs.items() if name != "use_cache"}  # there is none in a whole pass
    length = input_ids.shape[1]
    keep = length - 1 if logits_to_keep is None else checks.integer("logits_to_keep", logits_to_keep)
    if not 0 < keep < length:
        raise ValueError(f"logits_to_keep: is {keep}, must be in [1, {length - 1}]")
    temperature = checks.temperature(temperature)
    wanted = _wanted(input_ids, mask, **where)[:, -keep:]
    head = Head.of(model)
    _check_once(model, head, input_ids)
    found: list[tuple[Tensor, ...]] = []

    def project(hidden: Tensor) -> Tensor:
        states = hidden[:, -keep - 1 : -1]  # PEFT's virtual tokens come before all others
        results = op(
            states, head.weight, input_ids[:, -keep:], bias=head.bias, mask=wanted, softcap=head.softcap,
            temperature=temperature * head.temperature,
        )  # fmt: skip
        found.append(results if isinstance(results, tuple) else (results,))
        return found[-1][0][..., None]

    given = {name: x for name, x in where.items() if x is not None}
    with in_place_of(head.module, project):
        output = model(input_ids=input_ids, use_cache=False, **given, **inputs)
    if len(found) != 1:
        raise UnsupportedModelError(f"{type(model).__name__}: its forward called its head {len(found)} times")
    return tuple(_Tied.apply(x, output.logits) for x in found[0])


def _wanted(
    input_ids: Tensor, mask: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """(B, T) bool: the tokens that count, but for the first of each row, which nothing predicts."""
    checks.mask("mask", mask, input_ids, input_ids.shape)
    wanted = checks.read_mask("reference", "mask", mask, input_ids)
    assert wanted is not None
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        seen = attention_mask != 0
        wanted = wanted & seen & seen.roll(1, 1)
    if position_ids is not None and position_ids.shape[-2:] == input_ids.shape[-2:]:
        # Models of images and text have several positions for each token. All are 0 where a sequence begins.
        wanted = wanted & (position_ids.reshape(-1, *input_ids.shape) != 0).any(0)
    return wanted


_turns: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_taking_turns = threading.Lock()


@contextlib.contextmanager
def in_place_of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Has a module run another function as its ``forward``; its hooks, which gather what is sharded, still run.

    That is so in this thread. In others the module runs as before, and a replacement there waits for the end of this.
    """
    with _taking_turns:
        turn = _turns.setdefault(module, threading.RLock())
    with turn:
        before = vars(module).get("forward")
        usual = before or partial(type(module).forward, module)
        thread = threading.get_ident()

        def either(*inputs: Any, **options: Any) -> Any:
            # A compiler can't ask which thread it is in; what it compiles is called where it was compiled.
            here = torch.compiler.is_compiling() or threading.get_ident() == thread
            return (forward if here else usual)(*inputs, **options)

        vars(module)["forward"] = either
        try:
            yield
        finally:
            if before is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = before


class _Tied(torch.autograd.Function):
    """The result itself. In the backward the model's output gets a gradient of 0, on which FSDP's hooks wait."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (output,) = ctx.saved_tensors
        return gradient, torch.zeros_like(output)


_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _check_once(model: nn.Module, head: Head, input_ids: Tensor) -> None:
    """Compares the head's logits on a few tokens with the model's own, once for each model."""
    causal = _unwrapped(model)
    if causal in _checked or torch.compiler.is_compiling():
        return
    few = input_ids[:1, :4]
    found: list[tuple[Tensor, torch.dtype]] = []

    def project(hidden: Tensor) -> Tensor:
        product = torch.nn.functional.linear(hidden, head.weight, head.bias)
        found.append((transformed(product, head.softcap, head.temperature), hidden.dtype))
        return hidden[..., :1]

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            with in_place_of(head.module, project):
                model(input_ids=few, use_cache=False)
            expected = model(input_ids=few, use_cache=False).logits.float()
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not found:
        raise UnsupportedModelError(f"{type(causal).__name__}: its forward did not call its head")
    logits, dtype = found[0]
    if torch.is_autocast_enabled(input_ids.device.type):  # the states may be more precise than what follows
        dtype = max(dtype, torch.get_autocast_dtype(input_ids.device.type), key=TOLERANCE.__getitem__)
    if not (error := relative_error(logits, expected)) <= TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"{type(causal).__name__}: its logits are not its last hidden states times its output embeddings "
            f"(they differ by {error:.2g} of their size)"
        )
    _checked.add(causal)
