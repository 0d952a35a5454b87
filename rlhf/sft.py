"""Step 1: supervised fine-tuning on demonstrations (Ouyang et al. 2022, sections 3.1 and 3.5, appendix C.1).

    L_SFT(φ) = −E_(x,y)~D [ mean_t log π_φ(y_t | x, y_<t) ]        over the tokens of the demonstrated completions y

Sixteen epochs, cosine decay of the learning rate to a tenth, residual dropout 0.2. For the model that PPO starts
from, the paper trains 2 epochs and mixes in 10 % pretraining text (C.3): ``pretraining_fraction``.

    rlhf sft --model gpt2 --data demonstrations.jsonl --output_dir runs/sft
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlhf import report
from rlhf.batch import Batch
from rlhf.config import SFTConfig, cosine_to_tenth
from rlhf.data import (
    Example,
    Limits,
    read_demonstrations,
    read_texts,
    tokenize_demonstrations,
    tokenize_texts,
)
from rlhf.loading import check_context, check_embedded, load_tokenizer, shared_context
from rlhf.models import LanguageModel, unwrap
from rlhf.objects import Data
from rlhf.training import (
    Run,
    accumulate,
    backward,
    batch_indices,
    hold_out,
    make_optimizer,
    optimizer_step,
)
from rlhf_kernels import linear_cross_entropy

logger = logging.getLogger(__name__)


def train(config: SFTConfig, *, resume: bool = False) -> Path:
    """Fine-tunes ``config.model`` on ``config.data`` and returns the directory of the result."""
    # Everything that can be wrong with the data is found before any weights are read.
    demonstrations = read_demonstrations(config.data)
    texts = pretraining_texts(config.pretraining_data, "pretraining_fraction", config.pretraining_fraction)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    limits = Limits(**asdict(config.lengths), context_length=shared_context(config.model))
    examples = tokenize_demonstrations(demonstrations, tokenizer, limits)
    training, held_out = hold_out(len(examples), config.held_out_fraction, config.seed)
    if texts:
        check_context("pretraining_tokens", config.pretraining_tokens, config.model)
    pretraining = pretraining_examples(texts, tokenizer, config.pretraining_tokens) if texts else []
    check_embedded(tokenizer, (example.group for example in [*examples, *pretraining]), config.model)

    run = Run("sft", config, resume=resume)
    if run.finished:
        return run.directory / "model"
    torch.manual_seed(config.seed)
    model = LanguageModel.load(
        config.model, residual_dropout=config.residual_dropout, attention=config.attention, device=run.device
    )
    model = run.place_trained(model, config.model)
    model, optimizer = run.prepare((model, make_optimizer(model, config.adam)))
    validation = [examples[i] for i in held_out]

    pretraining_size = max(1, round(config.batch_size * config.pretraining_fraction)) if pretraining else 0
    demonstration_size = config.batch_size - pretraining_size
    steps = math.ceil(config.epochs * len(training) / demonstration_size)
    for step in run.steps(steps):
        batch = [
            examples[training[i]]
            for i in batch_indices(len(training), demonstration_size, step, seed=config.seed, epochs=config.epochs)
        ]
        if pretraining_size:
            batch += [pretraining[i] for i in batch_indices(len(pretraining), pretraining_size, step, seed=config.seed)]
        factor = cosine_to_tenth(step, steps)
        before = {"held_out_loss_before": mean_loss(run, model, validation)} if validation and step == 0 else {}
        model.train()
        # A short last batch may leave a process without a share. It still runs, on an empty completion, since the other
        # processes wait for its gradient.
        share = run.processes.share(batch) or [batch[0].idle]
        loss = language_model_step(run, model, share)
        run.require_finite(loss=loss)
        norm = optimizer_step(run, model, optimizer, config.adam, factor)
        metrics = before | {"loss": loss, "learning_rate": config.adam.learning_rate * factor, "gradient_norm": norm}
        epoch_done = (step + 1) * demonstration_size // len(training) > step * demonstration_size // len(training)
        if validation and epoch_done:  # also true after the last step
            metrics["held_out_loss"] = mean_loss(run, model, validation)
        run.log(step, metrics, show=["loss", "held_out_loss"])
        if config.keep_every and (step + 1) % config.keep_every == 0:
            run.save_model(unwrap(model), tokenizer, f"step-{step + 1:06d}")

    rows: dict[str, float] = {"demonstrations": len(training), "epochs": config.epochs, "steps": steps}
    if validation and run.history:
        rows["held-out loss before (nats per token)"] = run.history[0]["held_out_loss_before"]
        rows["held-out loss after"] = run.history[-1]["held_out_loss"]
    report.write(run, "Supervised fine-tuning", rows, curves=[["loss", "held_out_loss"], ["learning_rate"]])
    # The model is saved last, since its presence means that the run is finished.
    path = run.save_model(unwrap(model), tokenizer)
    run.close()
    return path


def pretraining_texts(data: Data, name: str, weight: float) -> list[str]:
    """The pretraining text, if the setting ``name`` gives it a weight."""
    if weight:
        return read_texts(data)
    if data:
        logger.warning("pretraining_data: is not used, since %s is 0", name)
    return []


def pretraining_examples(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """Chunks of pretraining text. The first token is the prompt, since there is nothing to predict it from."""
    return [
        Example(prompt_ids=chunk[:1], completion_ids=chunk[1:])
        for chunk in tokenize_texts(texts, tokenizer, length=length).tolist()
    ]


def language_model_step(run: Run, model: LanguageModel, examples: list[Example], weight: float = 1.0) -> float:
    """Accumulates the gradient of ``weight`` times the mean loss per completion token. Returns the mean itself."""
    tokens = run.processes.sum(sum(len(example.completion_ids) for example in examples)).item()
    loss_sum = 0.0
    for _, batch in accumulate(run, model, examples):
        loss = token_loss(run, model, batch)
        backward(run, loss, weight / tokens)
        loss_sum += loss.item()
    return run.processes.sum(loss_sum).item() / tokens


@torch.no_grad()
def mean_loss(run: Run, model: LanguageModel, examples: list[Example]) -> float:
    """Mean negative log-likelihood per completion token, in nats."""
    was_training = model.training
    model.eval()
    batches = unwrap(model).batches([example.group for example in examples], run.config.tokens_per_forward)
    losses = [token_loss(run, model, batch).item() for batch in batches]
    model.train(was_training)
    return sum(losses) / sum(len(example.completion_ids) for example in examples)


def token_loss(run: Run, model: LanguageModel, batch: Batch) -> torch.Tensor:
    """The summed loss of all completion tokens, in one forward pass."""
    with run.accelerator.autocast():
        return model(batch, linear_cross_entropy, reduction="sum")
