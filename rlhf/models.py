"""Hugging Face models as the recipe sees them: a language model that gives log-probs, a scalar model that gives scores.

In training neither builds the (tokens, vocabulary) logits. A :class:`LanguageModel` runs the backbone and hands the
hidden states that predict response tokens, with the output projection, to an op of ``rlhf_kernels``. The op is called
inside ``forward`` so that DDP and FSDP can wrap all of it. Making one of either kind runs the model a few times, on
random tokens: :mod:`rlhf.probe` tries what is taken for granted of it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf import lora, probe, varlen
from rlhf.batch import Batch, Group, Layout, lay_out, split
from rlhf.decoding import Decoding, linear
from rlhf.errors import UserError
from rlhf.fields import type_and_line
from rlhf.loading import (
    ModelError,
    ModelSource,
    check_reward_config,
    classifier_class,
    is_classifier,
    load,
    load_config,
    loading_lines,
    name_of,
)
from rlhf.sharding import whole
from rlhf_kernels.integrations.transformers import TOLERANCE, Head, active_head, logit_transform, transformed

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

# The names under which architectures keep the dropout on a block's output (the residual dropout of the paper), and the
# dropouts that the paper does not use.
RESIDUAL_DROPOUT = ("resid_pdrop", "hidden_dropout", "residual_dropout", "dropout")
OTHER_DROPOUT = ("embd_pdrop", "attn_pdrop", "attention_dropout", "embedding_dropout", "activation_dropout")


class Backbone(nn.Module):
    """What both kinds of model share: a Hugging Face model whose hidden states are read at chosen positions."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        with self.probing():
            self.layout = self._find_layout()
            self.shares_prompts = self._shares_prompts()

    @classmethod
    def outline(cls, model: PreTrainedModel) -> Self:
        """A model whose parts are looked at, and that is not tried."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.model = model
        return self

    @classmethod
    def made_of(cls, model: PreTrainedModel, source: ModelSource) -> Self:
        """Wraps a model that was loaded. Errors say where it was loaded from."""
        try:
            return cls(model)
        except ModelError as error:
            raise ModelError(f"{source}: {error}" if isinstance(source, (str, Path)) else str(error)) from error

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def inner(self) -> nn.Module:
        """The part that gives hidden states, without a head."""
        base = self.model.base_model
        return base if base is not self.model else base.get_submodule("model")  # the type misnames its backbone

    @property
    def blocks(self) -> list[Any]:
        """The blocks that the model repeats, in order: those that its type names for transformers, or its layers.

        Raises:
            ModelError: there is neither.
        """
        names = set(self.model._no_split_modules or ())
        found = {name: module for name, module in self.inner.named_modules() if type(module).__name__ in names}
        outermost = [module for name, module in found.items() if not any(name.startswith(f"{each}.") for each in found)]
        if outermost:
            return outermost
        layers = self.model.config.get_text_config().num_hidden_layers
        for module in self.inner.modules():
            if isinstance(module, nn.ModuleList) and len(module) == layers:
                return list(module)
        raise ModelError(f"{self.name}: which of its modules are its blocks can't be told")

    @property
    def name(self) -> str:
        """The model's type, for messages."""
        return str(self.model.config.model_type)

    @property
    def flash(self) -> bool:
        """Whether attention is flash-attn's, or torch's from it: both run only on a GPU and in 16 bits."""
        implementation = self.model.config._attn_implementation or ""
        return "flash" in implementation or implementation == varlen.NAME

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Evaluation mode, in the precision that the model can run in."""
        mode = self.model.training
        self.model.eval()
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.flash):
                yield
        finally:
            self.model.train(mode)

    @property
    def tolerance(self) -> float:
        """The largest relative error between two ways to compute the same thing that probing accepts."""
        return TOLERANCE[torch.bfloat16 if self.flash else self.model.dtype]

    def _find_layout(self) -> Layout:
        """The fastest layout in which sequences do not see each other."""
        layouts: tuple[Layout, ...] = ("one_row" if self.flash else "packed", "padded")
        layout, reasons = first_that_holds(layouts, lambda it: probe.layout_error(self, it), self.tolerance)
        if layout is None:
            raise ModelError(
                f"{type(self.model).__name__}: hidden states of sequences in a batch are not those of each alone "
                f"({'; '.join(reasons)}); this architecture is not supported"
            )
        if layout == "padded":
            say_once(
                self.name,
                f"models let sequences laid end to end see each other ({reasons[0]}): each gets a padded row of its "
                "own, which is slower",
            )
        return layout

    def _shares_prompts(self) -> bool:
        """Whether several responses can follow their prompt in one row, each as if it were alone with the prompt.

        Attention that reaches only so far would count the other responses in. The few tokens tried do not show that, so
        the configuration is asked.
        """
        config = self.model.config.get_text_config().to_dict()
        limits = ("window", "window_size", "chunk_size")
        if self.layout != "packed" or any(value and name.endswith(limits) for name, value in config.items()):
            return False
        found, _ = first_that_holds(["shared"], lambda it: probe.layout_error(self, it), self.tolerance)
        return found is not None

    def layout_of(self, groups: Sequence[Group]) -> Layout:
        """The layout that is right for the model, and for these groups the fastest."""
        several = any(len(group.responses) > 1 for group in groups)
        return "shared" if several and self.shares_prompts else self.layout

    def lay_out(self, groups: Sequence[Group]) -> Batch:
        """Prompts and responses as a batch on the model's device."""
        return lay_out(groups, self.layout_of(groups)).to(self.device)

    def parts(self, groups: Sequence[Group], tokens: int) -> list[list[int]]:
        """Indices of groups, in order, in parts that fit a batch of ``tokens`` positions."""
        return list(split(groups, tokens, self.layout_of(groups)))

    def batches(self, groups: Sequence[Group], tokens: int) -> Iterator[Batch]:
        """All groups, in order, in batches of ``tokens`` positions."""
        for part in self.parts(groups, tokens):
            yield self.lay_out([groups[i] for i in part])

    def hidden(self, batch: Batch, positions: Tensor) -> Tensor:
        """(len(positions), D) last hidden states at flat positions of the batch."""
        mask = batch.attention_mask
        if mask is not None and mask.dim() == 4 and self.model.config._attn_implementation == "eager":
            # It adds the mask to its scores, where others also take a mask of what is seen.
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, torch.finfo(self.model.dtype).min)
        where = {"position_ids": batch.position_ids, "attention_mask": mask}
        states = self.inner(
            input_ids=batch.input_ids, use_cache=False, **{name: t for name, t in where.items() if t is not None}
        ).last_hidden_state
        return states.flatten(0, 1)[positions]

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function that runs the model. A sharded model has its weights outside of blocks gathered for it."""
        return function(*args)

    def save(
        self,
        directory: Path,
        tokenizer: PreTrainedTokenizerBase,
        weights: dict[str, Tensor] | None = None,
        *,
        merged: bool = True,
    ) -> None:
        """Writes weights (safetensors), configuration and tokenizer, as ``from_pretrained`` reads them.

        ``weights`` are those of all processes, if each holds only a part of them. A model that has an adapter is
        ``merged`` with it, or the adapter is written alone.
        """
        if not lora.has_adapter(self.model):
            self.model.save_pretrained(directory, state_dict=weights)
        else:
            (lora.save_merged if merged else lora.save_adapter)(self.model, directory, weights)
        tokenizer.save_pretrained(directory)


def first_that_holds(
    options: Sequence[Any], error: Callable[[Any], float], tolerance: float
) -> tuple[Any | None, list[str]]:
    """The first option whose error is within the tolerance, and why the options before it were not taken."""
    reasons = []
    for option in options:
        try:
            found = error(option)
        except UserError:  # attention that says what it can't do
            raise
        except Exception as problem:  # a model's code may raise anything for input that it does not expect
            reasons.append(f"{option}: {type_and_line(problem)}")
            logger.debug("%s could not be tried", option, exc_info=True)  # in case the fault is in our code
            continue
        if found <= tolerance:
            return option, reasons
        reasons.append(f"{option}: they differ by {found:.2g} of their size")
    return None, reasons


def say_once(model_type: str, message: str) -> None:
    """Warns about a type of model only once, although a run may load several models of that type."""
    if (key := (model_type, message.partition(" (")[0])) not in _said:
        _said.add(key)
        logger.warning("%s %s", model_type, message)


_said: set[tuple[str, str]] = set()


def unwrap(model: Any) -> Any:
    """The model inside DDP's wrapper, or the model itself."""
    return getattr(model, "module", model)


class LanguageModel(Backbone):
    """A causal LM. ``forward`` applies an op of ``rlhf_kernels`` to the states that predict the response tokens."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        # Cohere multiplies its logits by a constant and Granite divides: either acts as a temperature.
        self.softcap, self.own_temperature = logit_transform(model.config)
        with self.probing():
            self._check_projection()
            self.decoding = self._find_decoding()

    @classmethod
    def load(
        cls,
        source: ModelSource,
        *,
        residual_dropout: float = 0.0,
        attention: str | None = None,
        device: torch.device | str = "cpu",
    ) -> LanguageModel:
        """The model in float32 on ``device``, with every dropout except the residual one at zero."""
        config = load_config(source)
        if isinstance(source, (str, Path)) and is_classifier(config):
            raise ModelError(f"{source}: is a reward model, not a language model")
        set_dropout(config, OTHER_DROPOUT, 0.0)
        residual = [name for name in RESIDUAL_DROPOUT if hasattr(config, name)][:1]
        set_dropout(config, residual, residual_dropout)
        if residual_dropout and not residual:
            logger.warning(
                "%s: %s models have no residual dropout; trained without", name_of(source), config.model_type
            )
        auto = AutoModelForCausalLM if isinstance(source, (str, Path)) else type(source)
        return cls.made_of(load(auto, source, config, attention, device), source)

    @property
    def projection(self) -> tuple[Tensor, Tensor | None]:
        """(V, D) weight and (V,) bias of the head, with what an adapter adds to them."""
        head: Any = self.model.get_output_embeddings()
        if hasattr(head, "base_layer"):
            head = Head.of(self.model)
        return head.weight, getattr(head, "bias", None)

    @torch.no_grad()
    def project(self, states: Tensor) -> Tensor:
        """(..., V) float32 logits of (..., D) last hidden states, as the model's own head makes them."""
        weight, bias = self.projection
        product = linear(states, weight.to(states.dtype), bias)
        return transformed(product, self.softcap, self.own_temperature)

    @torch.no_grad()
    def next_logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(len(sequences), V) float32 logits of the token after each sequence, by a whole pass over all of them."""
        batch = self.lay_out([Group(sequence, [[]]) for sequence in sequences])
        return self.project(self.hidden(batch, batch.last))

    def forward(
        self, batch: Batch, op: Callable[..., Any], *args: Any, temperature: float = 1.0, **options: Any
    ) -> Any:
        """Calls ``op(hidden, weight, targets, *args, ...)``, a ``linear_*`` op, with this model's projection."""
        hidden, (weight, bias) = self.hidden(batch, batch.before), self.projection
        return op(
            hidden,
            weight,
            batch.targets,
            *args,
            bias=bias,
            softcap=self.softcap,
            temperature=temperature * self.own_temperature,
            **options,
        )

    def _check_projection(self) -> None:
        """Raises for an architecture whose logits are not the projection that this class computes."""
        name = type(self.model).__name__
        if self.model.get_output_embeddings() is None:
            raise ModelError(f"{name} has no output embeddings; it is no causal language model")
        held, reasons = first_that_holds(["logits"], lambda _: probe.projection_error(self), self.tolerance)
        if not held:
            raise ModelError(
                f"{name}: its logits are not its last hidden state times its output embeddings "
                f"({reasons[0]}); this architecture is not supported"
            )

    def _find_decoding(self) -> Decoding:
        """The fastest way to sample whose logits are those of a whole pass."""
        ways: tuple[Decoding, ...] = ("padded", "aligned", "whole")
        decoding, reasons = first_that_holds(ways, lambda it: probe.decoding_error(self, it), self.tolerance)
        if decoding is None:
            raise ModelError(
                f"{type(self.model).__name__}: its logits in a growing sequence are not those of the whole sequence "
                f"({'; '.join(reasons)}); this architecture is not supported"
            )
        if decoding != "padded":
            how = {
                "aligned": "only prompts of one length are sampled together",
                "whole": "sampled without a cache, every sequence whole for every token",
            }[decoding]
            say_once(
                self.name,
                f"models give other logits with a cache than without ({reasons[-1]}): {how}, which is slower",
            )
        return decoding


class ScalarModel(Backbone):
    """A reward or value model: a sequence classifier of transformers with one label.

    The shift that makes demonstrations score 0 on average (the paper, section 3.5) goes into the head's bias. Most
    heads have no bias: then the shift is kept in the configuration as ``reward_bias``. Other tools can load such a
    model, but do not add that constant, so their scores differ from ours by it. The saved model's README.md says so.
    """

    @classmethod
    def load(
        cls, source: ModelSource, *, attention: str | None = None, device: torch.device | str = "cpu"
    ) -> ScalarModel:
        """Loads a reward model, or puts a new head of one label on a language model's backbone.

        The new head starts at zero, so that the first scores carry no arbitrary preference.
        """
        config = load_config(source)
        fresh = not is_classifier(config)
        if not fresh:
            check_reward_config(source)
        else:
            config.num_labels = 1
            config.reward_bias = 0.0
        set_dropout(config, (*OTHER_DROPOUT, *RESIDUAL_DROPOUT), 0.0)
        loaded = load(classifier_class(config), source, config, attention, device, new_head=fresh)
        scalar = cls.made_of(loaded, source)
        if fresh:
            for parameter in scalar.head.parameters():
                nn.init.zeros_(parameter)
        return scalar

    @property
    def head_name(self) -> str:
        """What the type calls its projection to one label: GPT-2, Llama and most others `score`, a few `classifier`."""
        return "score" if hasattr(self.model, "score") else "classifier"

    @property
    def head(self) -> nn.Linear:
        """The projection to one label."""
        return active_head(self.model.get_submodule(self.head_name))

    @property
    def bias(self) -> float:
        """The constant that is added to the head's product, in reward units."""
        if self.head.bias is not None:
            return whole(self.head.bias.detach()).item()
        return getattr(self.model.config, "reward_bias", 0.0)

    @bias.setter
    def bias(self, value: float) -> None:
        if self.head.bias is not None:
            nn.init.constant_(self.head.bias, value)
        else:
            self.model.config.reward_bias = value

    def forward(self, batch: Batch, positions: Tensor) -> Tensor:
        """(len(positions),) float32 scores at flat positions: ``batch.last`` for rewards, ``before`` for values."""
        scores = self.head(self.hidden(batch, positions).to(self.head.weight.dtype)).squeeze(-1).float()
        return scores if self.head.bias is not None else scores + self.bias

    def save(self, directory: Path, tokenizer: PreTrainedTokenizerBase, *weights: Any, **options: Any) -> None:
        """Also writes which token is padding, since other tools read the score at the last token that is not."""
        distinct = tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
        self.model.config.pad_token_id = tokenizer.pad_token_id if distinct else None
        super().save(directory, tokenizer, *weights, **options)
        (directory / "README.md").write_text(self.card())

    def card(self) -> str:
        """What someone who finds the saved model should know, in Markdown."""
        name = type(self.model).__name__
        states = "model.base_model(input_ids).last_hidden_state"
        reading = f"scores = model.{self.head_name}({states})[..., 0]  # one for every token"
        lines = ["# A reward or value model", "", "A completion's score is that of its last token:", ""]
        lines += ["```python", *loading_lines(self.model), reading, "```", ""]
        if self.head.bias is None and self.bias:
            lines += [
                f"`{name}` has no bias in its head, so `reward_bias` in `config.json` holds the constant that makes "
                f"demonstrations score 0 on average: rlhf adds {self.bias:+.6g} to what the lines above give. "
                "Differences between scores, and so rankings, are the same with and without it.",
                "",
            ]
        return "\n".join(lines)


def set_dropout(config: Any, names: Sequence[str], value: float) -> None:
    """Sets those of the dropouts that the configuration has."""
    for name in names:
        if hasattr(config, name):
            setattr(config, name, value)
