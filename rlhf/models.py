"""Hugging Face models as the recipe sees them: a language model that gives log-probs, a scalar model that gives scores.

Neither ever builds the (tokens, vocabulary) logits. A :class:`LanguageModel` runs the backbone and hands the hidden
states that predict response tokens, with the output projection, to an op of ``rlhf_kernels``. Calling the op inside
``forward`` is what lets DDP and FSDP wrap the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.batch import Batch, lay_out

logger = logging.getLogger(__name__)

# The names under which architectures keep the dropout on a block's output (the residual dropout of the paper) and the
# dropouts that the paper does not use.
RESIDUAL_DROPOUT = ("resid_pdrop", "hidden_dropout", "residual_dropout", "dropout")
OTHER_DROPOUT = ("embd_pdrop", "attn_pdrop", "attention_dropout", "embedding_dropout", "activation_dropout")


class ModelError(ValueError):
    """A model or tokenizer that cannot play the part it was given."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; it must have an end-of-sequence token, since that is how a response ends."""
    check_directory(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no tokenizer could be loaded from there: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no eos_token, so no response could end; set one and save it again")
    return tokenizer


def check_directory(path: str) -> None:
    """Whatever cannot be a hub name (owner/name) must be a directory: no use in asking the hub for it."""
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise ModelError(f"{path}: no such directory")


def load_config(path: str) -> Any:
    """A model's configuration alone, so that data can be checked before any weights are read."""
    check_directory(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no model could be loaded from there: {first_line(error)}") from error


def context_length(config: Any) -> int:
    """How many tokens the model can see."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31


def check_same_tokenizer(first: PreTrainedTokenizerBase, first_path: str, other_path: str) -> None:
    """A reward model reads the policy's tokens as they are, so both must mean the same by them."""
    other = load_tokenizer(other_path)
    if first.get_vocab() == other.get_vocab() and first.eos_token_id == other.eos_token_id:
        return
    differing = set(first.get_vocab().items()) ^ set(other.get_vocab().items())
    example = (
        f", for example {min(differing)[0]!r}" if differing else f": eos is {first.eos_token!r} / {other.eos_token!r}"
    )
    raise ModelError(
        f"the tokenizers of {first_path} and {other_path} differ ({len(first)} and {len(other)} tokens{example}); "
        "policy, reference, reward and value model must share one"
    )


def check_reward_config(path: str) -> Any:
    """The configuration of a reward model, which must have one label."""
    config = load_config(path)
    architectures = config.architectures or []
    if not any("SequenceClassification" in name for name in architectures):
        raise ModelError(
            f"{path}: {architectures or 'an unnamed model'} is not a reward model; train one with `rlhf reward`"
        )
    if config.num_labels != 1:
        raise ModelError(f"{path}: has {config.num_labels} labels, but a reward model has one")
    return config


def first_line(error: BaseException) -> str:
    """An error's first line: libraries add paragraphs that would bury it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Backbone(nn.Module):
    """What both kinds of model share: a Hugging Face model whose hidden states are read at chosen positions."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def one_row(self) -> bool:
        """Whether attention takes sequence boundaries from a single packed row (flash-attn) or from a mask (SDPA)."""
        return "flash" in (self.model.config._attn_implementation or "")

    def lay_out(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
        """Prompts and responses as a batch on the model's device, in the layout its attention wants."""
        return lay_out(prompts, responses, one_row=self.one_row).to(self.device)

    def hidden(self, batch: Batch, positions: Tensor) -> Tensor:
        """(len(positions), D) last hidden states at flat positions of the batch."""
        states = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        return states.flatten(0, 1)[positions]

    def save(self, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes weights (safetensors), configuration and tokenizer, as ``from_pretrained`` reads them."""
        self.model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def unwrap(model: Any) -> Any:
    """The model inside DDP's wrapper, or the model itself."""
    return getattr(model, "module", model)


class LanguageModel(Backbone):
    """A causal LM. ``forward`` applies an op of ``rlhf_kernels`` to the states that predict the response tokens."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits by a constant, Granite divides: either way a temperature of the model's own.
        self.own_temperature: float = getattr(config, "logits_scaling", 1.0) / (
            getattr(config, "logit_scale", None) or 1.0
        )
        self._check_projection()

    @classmethod
    def load(
        cls, path: str, *, residual_dropout: float = 0.0, attention: str = "sdpa", **options: Any
    ) -> LanguageModel:
        """Loads ``path`` (a directory or a hub name) in float32 with every dropout at zero but the residual one."""
        config = load_config(path)
        for name in OTHER_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        residual = next((name for name in RESIDUAL_DROPOUT if hasattr(config, name)), None)
        if residual:
            setattr(config, residual, residual_dropout)
        elif residual_dropout:
            logger.warning("%s: %s models have no residual dropout; trained without", path, config.model_type)
        return cls(load(AutoModelForCausalLM, path, config, attention, **options))

    def forward(
        self, batch: Batch, op: Callable[..., Any], *args: Any, temperature: float = 1.0, **options: Any
    ) -> Any:
        """``op(hidden, weight, targets, *args, ...)`` with this model's projection: one of the ``linear_*`` ops."""
        head = self.model.get_output_embeddings()
        return op(
            self.hidden(batch, batch.before),
            head.weight,
            batch.targets,
            *args,
            bias=getattr(head, "bias", None),
            softcap=self.softcap,
            temperature=temperature * self.own_temperature,
            **options,
        )

    @torch.no_grad()
    def _check_projection(self) -> None:
        """Fails for an architecture whose logits are not the projection this class takes them for."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(self.model).__name__} has no output embeddings; it is no causal language model")
        mode, _ = self.model.training, self.model.eval()
        ids = torch.arange(4, device=self.device)[None] % head.weight.shape[0]
        everything = torch.ones_like(ids)
        states = self.model.base_model(ids, attention_mask=everything).last_hidden_state
        logits = nn.functional.linear(states, head.weight, getattr(head, "bias", None))
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        expected = self.model(ids, attention_mask=everything).logits.float()
        self.model.train(mode)
        difference = (logits.float() / self.own_temperature - expected).abs().max().item()
        if difference > 0.05 * expected.abs().max().item() + 1e-6:
            raise ModelError(
                f"{type(self.model).__name__}: its logits are not its last hidden state times its output embeddings "
                f"(they differ by {difference:.2g}); this architecture is not supported"
            )


class ScalarModel(Backbone):
    """A reward or value model: ``AutoModelForSequenceClassification`` with one label.

    The shift that makes demonstrations score 0 on average (the paper, section 3.5) is kept in the configuration as
    ``reward_bias``, because the heads of these models have no bias: other tools load the model as it is, and see
    scores that differ from ours by that constant.
    """

    @classmethod
    def load(cls, path: str, *, attention: str = "sdpa", **options: Any) -> ScalarModel:
        """Loads a reward model, or puts a new head of one label on a language model's backbone.

        The new head starts at zero, so that the first scores carry no arbitrary preference.
        """
        config = load_config(path)
        fresh = not any("SequenceClassification" in name for name in config.architectures or [])
        if fresh:
            config.num_labels = 1
            config.reward_bias = 0.0
        for name in (*OTHER_DROPOUT, *RESIDUAL_DROPOUT):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        scalar = cls(load(AutoModelForSequenceClassification, path, config, attention, **options))
        if fresh:
            for parameter in scalar.head.parameters():
                nn.init.zeros_(parameter)
        return scalar

    @property
    def head(self) -> nn.Module:
        """The projection to one label: GPT-2, Llama and most others call it `score`, a few `classifier`."""
        return self.model.get_submodule("score" if hasattr(self.model, "score") else "classifier")

    @property
    def bias(self) -> float:
        """The constant added to the head's output, in reward units."""
        return getattr(self.model.config, "reward_bias", 0.0)

    @bias.setter
    def bias(self, value: float) -> None:
        self.model.config.reward_bias = value

    def forward(self, batch: Batch, positions: Tensor) -> Tensor:
        """(len(positions),) float32 scores at flat positions: ``batch.last`` for rewards, ``before`` for values."""
        return self.head(self.hidden(batch, positions)).squeeze(-1).float() + self.bias

    def save(self, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Also tells other tools which token is padding: they read the score at the last token that is none."""
        distinct = tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
        self.model.config.pad_token_id = tokenizer.pad_token_id if distinct else None
        super().save(directory, tokenizer)


def load(auto: Any, path: str, config: Any, attention: str, **options: Any) -> PreTrainedModel:
    """``auto.from_pretrained`` with one-line errors."""
    try:
        return auto.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation=attention, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: could not be loaded as {auto.__name__}: {first_line(error)}") from error
