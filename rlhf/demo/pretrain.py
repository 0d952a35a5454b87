"""The base models: a word-level tokenizer and GPT-2-shaped models trained on the world's documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf import report
from rlhf.config import Adam, RunConfig, cosine_to_tenth
from rlhf.models import LanguageModel, unwrap
from rlhf.sft import language_model_step, pretraining_examples
from rlhf.training import Run, batch_indices, holds_run, make_optimizer, optimizer_step

CONTEXT = 256
CHUNK = 128


@dataclass(frozen=True)
class Size:
    """A base model's shape, and how it is pretrained."""

    width: int
    layers: int
    heads: int
    batch_size: int
    steps: int
    learning_rate: float
    mixed_precision: Literal["no", "bf16"] = "no"


def make_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Every word of the world is one token; words are what spaces separate."""
    words = ["<pad>", "<eos>", "<unk>", *sorted(vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=CONTEXT
    )


def pretrain(
    output_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    size: Size,
    *,
    seed: int,
) -> Path:
    """Trains a GPT-2 of the given size on the documents and returns the directory of the result."""
    settings = RunConfig(str(output_dir), seed=seed, checkpoint_every=200, mixed_precision=size.mixed_precision)
    run = Run("pretrain", settings, resume=holds_run(output_dir))
    if run.finished:
        return run.directory / "model"
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        # Exact, where GPT-2 has an approximation by tanh, with which torch takes two to four times as long on a CPU.
        activation_function="gelu",
        # Small widths need larger weights than GPT-2's 0.02 to learn to copy a name from the prompt.
        initializer_range=0.7 * size.width**-0.5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    chunks = pretraining_examples(list(documents), tokenizer, CHUNK)
    model = LanguageModel(GPT2LMHeadModel(config))
    adam = Adam(learning_rate=size.learning_rate)
    model, optimizer = run.prepare((model, make_optimizer(model, adam)))
    for step in run.steps(size.steps):
        batch = [chunks[i] for i in batch_indices(len(chunks), size.batch_size, step, seed=seed)]
        loss = language_model_step(run, model, batch)
        warmup = min(1.0, (step + 1) / 50)
        optimizer_step(run, model, optimizer, adam, warmup * cosine_to_tenth(step, size.steps))
        run.log(step, {"loss": loss}, show=["loss"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report.write(
        run, "Pretraining", {"parameters": parameters, "tokens": size.steps * size.batch_size * CHUNK}, [["loss"]]
    )
    path = run.save_model(unwrap(model), tokenizer)
    run.close()
    return path
