"""Runs whole iterations of one trainer, in a process of its own, and prints how long each took, as JSON.

    python benchmarks/step_worker.py rlhf ppo '{"width": 256, ...}'

The other trainer, TRL, may need another Python than ours: then that one runs this file. So it imports nothing of ours
before it knows that it is to measure ours. Models have random weights; no token ends a completion.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

END, PADDING, FIRST_WORD = 1, 2, 3


def config_of(shape: dict[str, Any], **options: Any) -> GPT2Config | LlamaConfig:
    """A GPT-2 without dropout, or a Llama."""
    if shape.get("type") == "llama":
        heads = max(2, shape["width"] // 64)
        return LlamaConfig(
            vocab_size=shape["vocabulary"], hidden_size=shape["width"], intermediate_size=4 * shape["width"],
            num_hidden_layers=shape["layers"], num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
            max_position_embeddings=shape["prompt"] + shape["response"] + 8, tie_word_embeddings=True,
            bos_token_id=END, eos_token_id=END, pad_token_id=PADDING, **options,
        )  # fmt: skip
    return GPT2Config(
        vocab_size=shape["vocabulary"], n_embd=shape["width"], n_layer=shape["layers"], n_head=shape["width"] // 64,
        n_positions=shape["prompt"] + shape["response"] + 8, bos_token_id=END, eos_token_id=END, pad_token_id=PADDING,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options,
    )  # fmt: skip


def language_model(shape: dict[str, Any]) -> Any:
    """A policy that hardly ever ends a completion before the limit."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(shape))


def scalar_model(shape: dict[str, Any]) -> Any:
    """A reward or value model."""
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(config_of(shape, id2label={0: "score"}))


def words_of(ids: list[int]) -> str:
    """The text of these tokens."""
    return " ".join(f"t{i}" for i in ids)


def tokenizer_of(shape: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A word for every token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    named = {0: "<unknown>", END: "<end>", PADDING: "<padding>"}
    vocabulary = {named.get(i, f"t{i}"): i for i in range(shape["vocabulary"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=named[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=named[END], pad_token=named[PADDING], unk_token=named[0],
        padding_side="left",
    )  # fmt: skip


def random_ids(shape: dict[str, Any], count: int, length: int) -> list[list[int]]:
    """Sequences of words, always the same ones."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(FIRST_WORD, shape["vocabulary"], (count, length), generator=generator).tolist()


class Done(BaseException):
    """All steps were taken. Nothing is to be saved of them."""


class Clock:
    """The time between the ends of steps, of which the first also warms up.

    With ``profile`` there is a step more, whose profile is written there: a table of where the device's time went.
    """

    def __init__(self, steps: int, profile: str | None = None) -> None:
        self.steps, self.profile = steps, profile
        self.ends: list[float] = []
        self.profiler: Any = None

    @property
    def all_steps(self) -> int:
        """How many the trainer is to take."""
        return self.steps + 1 + (self.profile is not None)

    def tick(self, *_: Any, **__: Any) -> None:
        """A step has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) > 1 and self.profiler is None:  # at once: the process may yet be ended
            print(f"step {len(self.ends) - 1}: {self.seconds[-1]:.3f} s", file=sys.stderr, flush=True)
        if self.profile is None:
            return
        if len(self.ends) == self.steps + 1:
            kind = "CUDA" if torch.cuda.is_available() else "CPU"  # operators are too many to tell within minutes
            self.profiler = torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)])
            self.profiler.start()
        elif len(self.ends) == self.steps + 2:
            self.profiler.stop()
            device = "device" if torch.cuda.is_available() else "cpu"
            table = self.profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=40)
            Path(self.profile).write_text(table)
            raise Done

    @property
    def seconds(self) -> list[float]:
        """Of all steps but the first, and the one that is profiled."""
        return [later - earlier for earlier, later in zip(self.ends, self.ends[1 : self.steps + 1], strict=False)]


def rlhf_ppo(shape: dict[str, Any], clock: Clock) -> None:
    """Our PPO."""
    policy = saved(language_model, shape, "policy")
    reward_model = saved(scalar_model, shape, "reward_model")
    prompts = [{"prompt": words_of(ids)} for ids in random_ids(shape, 4 * shape["batch"], shape["prompt"])]
    run_command(
        "ppo", shape, clock, policy=policy, reward_model=reward_model, prompts=written(prompts),
        episodes=shape["batch"] * clock.all_steps, minibatch_size=shape["batch"] // shape["minibatches"],
    )  # fmt: skip


def rlhf_reward(shape: dict[str, Any], clock: Clock) -> None:
    """Our reward training, with K completions to a prompt, ranked from first to last."""
    model = saved(language_model, shape, "model")
    count, k = shape["batch"] * clock.all_steps, shape["completions"]
    answers = random_ids(shape, count * k, shape["response"] - 1)
    records = [
        {
            "prompt": words_of(ids),
            "completions": [words_of(answer) for answer in answers[i * k : (i + 1) * k]],
            "ranks": list(range(1, k + 1)),
        }
        for i, ids in enumerate(random_ids(shape, count, shape["prompt"]))
    ]
    run_command("reward", shape, clock, model=model, data=written(records), epochs=1, held_out_fraction=0.0)


def trl_ppo(shape: dict[str, Any], clock: Clock) -> None:
    """TRL's PPO with the same models, sizes and settings."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Follow(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    prompts = random_ids(shape, 4 * shape["batch"], shape["prompt"])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir="run", report_to="none", save_strategy="no", use_cpu=True, bf16=False, fp16=False,
            gradient_checkpointing=False, per_device_train_batch_size=shape["batch"],
            gradient_accumulation_steps=1, num_mini_batches=shape["minibatches"], num_ppo_epochs=1,
            local_rollout_forward_batch_size=shape["batch"], total_episodes=shape["batch"] * (shape["steps"] + 1),
            response_length=shape["response"], temperature=1.0, num_sample_generations=0, disable_tqdm=True,
            learning_rate=1e-5, kl_coef=0.02,
        ),
        processing_class=tokenizer_of(shape),
        model=language_model(shape),
        ref_model=language_model(shape),
        reward_model=scalar_model(shape),
        value_model=scalar_model(shape),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[: shape["batch"]]}),
        callbacks=[Follow()],
    )  # fmt: skip
    trainer.train()


def trl_grpo(shape: dict[str, Any], clock: Clock) -> None:
    """TRL's GRPO, whose reward is the share of different words."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Follow(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    policy = saved(language_model, shape, "policy")
    prompts = [words_of(ids) for ids in random_ids(shape, 4 * shape["batch"], shape["prompt"])]
    trainer = GRPOTrainer(
        model=policy,
        args=GRPOConfig(
            output_dir="run", report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            gradient_checkpointing=False, per_device_train_batch_size=shape["batch"], num_generations=shape["group"],
            max_completion_length=shape["response"], max_steps=shape["steps"] + 1, beta=0.04, learning_rate=1e-5,
        ),
        reward_funcs=lambda completions, **_: [len(set(text.split())) / shape["response"] for text in completions],
        processing_class=tokenizer_of(shape),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[Follow()],
    )  # fmt: skip
    trainer.train()


def patched_trl_grpo(shape: dict[str, Any], clock: Clock) -> None:
    """The same with our ops in it."""
    from rlhf_kernels.integrations import trl

    with trl.patch() as patch:
        trl_grpo(shape, clock)
        if not patch.calls:
            raise SystemExit(f"ours never ran: {patch}")


def saved(make: Callable[[dict[str, Any]], Any], shape: dict[str, Any], name: str) -> str:
    """A folder with a model and its tokenizer: in ``models``, if there is such a folder, for others that come later.

    In bfloat16 there, which takes half the time. It is made on the device, where random numbers are fast.
    """
    shared = shape.get("models")
    folder = Path(shared or ".") / name
    if not folder.exists():
        part = folder.with_suffix(".part")  # what was ended half way is done again
        with torch.device(shape.get("device", "cpu")):
            model = make(shape)
        (model.bfloat16() if shared else model).save_pretrained(part)
        tokenizer_of(shape).save_pretrained(part)
        part.rename(folder)
    return str(folder)


def written(records: list[dict[str, Any]]) -> str:
    """A file of these records."""
    Path("records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return "records.jsonl"


def run_command(stage: str, shape: dict[str, Any], clock: Clock, **settings: Any) -> None:
    """Runs the command ``rlhf``, and notes the time whenever it has logged a step."""
    from rlhf import cli
    from rlhf.training import Run

    log = Run.log

    def logged(*arguments: Any, **options: Any) -> None:
        log(*arguments, **options)
        clock.tick()

    Run.log = logged
    settings |= {
        "output_dir": "run", "device": shape.get("device", "cpu"), "batch_size": shape["batch"],
        "checkpoint_every": 10**9,
        "lengths.max_prompt_tokens": shape["prompt"], "lengths.max_response_tokens": shape["response"],
        **shape.get("settings", {}),
    }  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Done):  # the result is the last line of our output
        if cli.main([stage, *(f"--{name}={value}" for name, value in settings.items())]):
            raise SystemExit(f"rlhf {stage} failed")


def peak_bytes() -> int | None:
    """The most memory that this process has had; None where the system doesn't tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


WORK = {
    ("rlhf", "ppo"): rlhf_ppo, ("rlhf", "reward"): rlhf_reward, ("trl", "ppo"): trl_ppo, ("trl", "grpo"): trl_grpo,
    ("trl patched", "grpo"): patched_trl_grpo,
}  # fmt: skip


def main(trainer: str, stage: str, text: str) -> None:
    """Works in a temporary folder, and prints the result as the last line."""
    shape = json.loads(text)
    clock = Clock(shape["steps"], shape.get("profile"))
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            WORK[trainer, stage](shape, clock)
        finally:
            os.chdir(before)
    print(json.dumps({"seconds": clock.seconds, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
