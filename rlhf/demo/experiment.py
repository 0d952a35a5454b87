"""The paper's experiment, start to finish, each step in a directory of its own.

    world           documents, instructions, demonstrations (world.py), labellers with noise and tastes (labellers.py)
    base            two GPT-2-shaped models pretrained on the documents, 100 times apart in parameters
    sft             the small base, fine-tuned on the demonstrations
    rankings        K = 4 to 9 samples of the SFT model per prompt, ranked by the labellers
    reward          the reward model, from those rankings
    ppo, ppo_ptx    the policy, without and with the pretraining mix; ppo_free is PPO at β = 0
    evaluation      labellers who ranked nothing for the reward model compare everything with the SFT model

The trainer sees text, demonstrations and rankings. It never sees by what the labellers judge.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rlhf import ppo, reward, sft
from rlhf.checkpoints import RunError
from rlhf.config import Adam, LengthConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf.data import Limits, read_comparisons, tokenize_comparisons, tokenize_texts
from rlhf.demo import report
from rlhf.demo.background import Background
from rlhf.demo.config import DemoConfig
from rlhf.demo.labellers import Labeller, agreement, gold_utility, hire
from rlhf.demo.pretrain import CHUNK, CONTEXT, Size, make_tokenizer, pretrain
from rlhf.demo.world import STOP_WORD, Instruction, World, answer_page
from rlhf.evaluate import pretraining_loss, win_rate
from rlhf.files import write_whole
from rlhf.loading import load_tokenizer
from rlhf.models import LanguageModel, ScalarModel
from rlhf.processes import Processes
from rlhf.rollout import sample
from rlhf.training import console, holds_run, read_metrics

LENGTHS = LengthConfig(max_prompt_tokens=32, max_response_tokens=40)
SHOTS = 2
"""Worked examples in the few-shot prompt."""
GAMMA_PTX = 1.0
"""The paper's value is 27.8, but it does not say how the losses are normalised. Here both are means over tokens, and at
this size 27.8 leaves the reward no room."""


@dataclass(frozen=True)
class Data:
    """What the world and its labellers provide. Instructions of different steps are distinct."""

    world: World
    documents: list[str]
    held_out_documents: list[str]
    demonstrations: list[tuple[Instruction, str]]
    ranked: list[Instruction]
    ranked_held_out: list[Instruction]
    ppo: list[Instruction]
    evaluation: list[Instruction]
    labellers: list[Labeller]
    held_out_labellers: list[Labeller]


def run(config: DemoConfig, *, resume: bool = False) -> dict:
    """Runs the steps of the experiment that are not done yet, writes the report and returns its figures."""
    output = Path(config.output_dir)
    open_directory(output, config, resume)
    clock = Clock(output / "seconds.json")
    data = make_data(config)

    tokenizer = make_tokenizer(data.world.vocabulary)
    small_size = Size(48, 2, heads=3, batch_size=32, steps=config.small_steps, learning_rate=5e-3)
    large_size = Size(
        config.large_width, 6, heads=config.large_width // 56, batch_size=8, steps=config.large_steps,
        learning_rate=1.5e-3, mixed_precision="bf16" if has_fast_bf16() else "no",
    )  # fmt: skip
    # The models that are aligned are too small to keep two cores busy, so the large base trains on the other core.
    torch.set_num_threads(1)
    large = Background(pretrain, output / "large_base", tokenizer, data.documents, large_size, seed=config.seed)
    with clock.timing("base"):
        small = pretrain(output / "base", tokenizer, data.documents, small_size, seed=config.seed)
    with clock.timing("sft"):
        sft_model = train_sft(config, small)
    with clock.timing("rankings"):
        make_rankings(output / "data", data, sft_model, config.seed)
    with clock.timing("reward"):
        reward_model = train_reward(config, sft_model)
    policies: dict[str, Path] = {}
    variants: dict[str, dict[str, Any]] = {
        "ppo": {},
        "ppo_ptx": {"gamma_ptx": GAMMA_PTX, "pretraining_data": [str(output / "data/documents.jsonl")]},
        "ppo_free": {"kl_coefficient": 0.0},
    }
    for name, options in variants.items():
        with clock.timing(name):
            policies[name] = train_ppo(config, name, sft_model, reward_model, **options)
    with clock.timing("evaluation"):
        chunks = tokenize_texts(data.held_out_documents, tokenizer, length=CHUNK)
        models = {"base": small, "sft": sft_model, **policies}
        measured = {name: measure(config, data, chunks, name, path) for name, path in models.items()}
        few_shot = few_shot_answers(config, data, small)
        courses = {name: course(output / name, data) for name in policies}
    with clock.timing("waiting for the large base"):
        large.wait(output / "large_base/metrics.jsonl", config.large_steps)
    with clock.timing("evaluation"):
        measured["large_base"] = measure(config, data, chunks, "large_base", output / "large_base/model")
        figures = evaluate(config, data, measured, few_shot, reward_model) | {"course": courses}
    figures["seconds"] = clock.total()
    figures["seconds_by_step"] = clock.seconds
    report.write(output, figures)
    return figures


def open_directory(output: Path, config: DemoConfig, resume: bool) -> None:
    """Makes the directory. A directory that holds another experiment is renamed, so that nothing is overwritten."""
    settings = output / "config.yaml"
    asked = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    if settings.exists():
        present = yaml.safe_load(settings.read_text())
        if present != asked:
            aside = output.with_name(f"{output.name}-seed{present['seed']}-{int(settings.stat().st_mtime)}")
            output.rename(aside)
            console.print(f"{output} held an experiment with other settings; it is now {aside}")
        elif not resume:
            raise RunError(
                f"{output}: holds this experiment already; go on with --resume, or choose another output_dir"
            )
    try:
        (output / "data").mkdir(parents=True, exist_ok=True)
        write_whole(settings, yaml.safe_dump(asked, sort_keys=False))
    except OSError as error:
        raise RunError(f"{output}: cannot be used for output: {error.strerror}") from error


def make_data(config: DemoConfig) -> Data:
    """Draws everything from the seed, and writes what the trainer reads."""
    world, rng = World(config.seed), random.Random(f"data {config.seed}")
    held_out_prompts = max(config.ranked_prompts // 5, 1)
    sizes = [
        config.demonstrations,
        config.ranked_prompts,
        held_out_prompts,
        config.ppo_prompts,
        config.evaluation_prompts,
    ]
    instructions = world.instructions(sum(sizes), rng)
    parts = [[instructions.pop() for _ in range(size)] for size in sizes]
    staff = hire(world, 30, config.seed)
    data = Data(
        world=world,
        documents=world.documents(config.documents, rng),
        held_out_documents=world.documents(1_000, rng),
        demonstrations=[(instruction, world.demonstration(instruction, rng)) for instruction in parts[0]],
        ranked=parts[1],
        ranked_held_out=parts[2],
        ppo=parts[3],
        evaluation=parts[4],
        labellers=staff[:20],
        held_out_labellers=staff[20:],
    )
    folder = Path(config.output_dir) / "data"
    write_records(folder / "documents.jsonl", [{"text": text} for text in data.documents])
    write_records(
        folder / "demonstrations.jsonl", [{"prompt": i.prompt, "completion": text} for i, text in data.demonstrations]
    )
    write_records(folder / "prompts.jsonl", [{"prompt": i.prompt} for i in data.ppo])
    return data


def write_records(path: Path, records: list[dict]) -> None:
    """Writes JSONL."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def train_sft(config: DemoConfig, base: Path) -> Path:
    """Trains for the paper's 16 epochs. A model this small needs another learning rate, and 0.2 dropout is too much."""
    output = Path(config.output_dir)
    return sft.train(
        SFTConfig(
            output_dir=str(output / "sft"),
            seed=config.seed,
            model=str(base),
            data=[str(output / "data/demonstrations.jsonl")],
            held_out_fraction=0.1,
            residual_dropout=0.0,
            adam=Adam(learning_rate=1e-3),
            lengths=LENGTHS,
        ),
        resume=holds_run(output / "sft"),
    )


def make_rankings(folder: Path, data: Data, sft_model: Path, seed: int) -> None:
    """Samples the SFT model and has the samples ranked: for training, held-out prompts, and held-out labellers."""
    if (folder / "held_out_labellers.jsonl").exists():
        return
    rng = random.Random(f"rankings {seed}")
    for name, instructions, labellers in [
        ("comparisons", data.ranked, data.labellers),
        ("held_out_rankings", data.ranked_held_out, data.labellers),
        ("held_out_labellers", data.ranked_held_out, data.held_out_labellers),
    ]:
        sizes = [rng.randint(4, 9) for _ in instructions]
        prompts = [i.prompt for i, size in zip(instructions, sizes, strict=True) for _ in range(size)]
        samples = iter(sample_texts(sft_model, prompts, f"{name} {seed}"))
        records: list[dict[str, Any]] = []
        for instruction, size in zip(instructions, sizes, strict=True):
            completions = [next(samples) for _ in range(size)]
            ranks = rng.choice(labellers).rank(instruction, completions)
            records.append({"prompt": instruction.prompt, "completions": completions, "ranks": ranks})
        # A record with an empty completion would be refused, so the labellers skip such prompts.
        records = [record for record in records if all(text.strip() for text in record["completions"])]
        write_records(folder / f"{name}.jsonl", records)


def train_reward(config: DemoConfig, sft_model: Path) -> Path:
    """One epoch over the rankings, as in the paper."""
    output = Path(config.output_dir)
    return reward.train(
        RewardConfig(
            output_dir=str(output / "reward"),
            seed=config.seed,
            model=str(sft_model),
            data=[str(output / "data/comparisons.jsonl")],
            demonstrations=[str(output / "data/demonstrations.jsonl")],
            batch_size=16,
            adam=Adam(learning_rate=2e-3),
            lengths=LENGTHS,
        ),
        resume=holds_run(output / "reward"),
    )


def train_ppo(config: DemoConfig, name: str, sft_model: Path, reward_model: Path, **options) -> Path:  # noqa: ANN003
    """The paper's settings (batch 512, minibatch 64, β, clip, λ, EMA); learning rates are for a model this small."""
    output = Path(config.output_dir)
    return ppo.train(
        PPOConfig(
            output_dir=str(output / name),
            seed=config.seed,
            policy=str(sft_model),
            reward_model=str(reward_model),
            prompts=[str(output / "data/prompts.jsonl")],
            episodes=512 * config.ppo_iterations,
            adam=Adam(learning_rate=3e-4, eps=1e-5),
            value_adam=Adam(learning_rate=1e-3, eps=1e-5),
            checkpoint_every=20,
            keep_every=max(1, config.ppo_iterations // 6),
            pretraining_per_episode=1,
            pretraining_tokens=CHUNK,
            lengths=LENGTHS,
            **options,
        ),
        resume=holds_run(output / name),
    )


def sample_texts(path: Path, prompts: list[str], seed: str) -> list[str]:
    """One completion per prompt at temperature 1, as text."""
    tokenizer, model = load_tokenizer(str(path)), LanguageModel.load(str(path)).eval()
    completions = sample(
        model,
        tokenizer(prompts).input_ids,
        end_token_ids={tokenizer.eos_token_id},
        max_new_tokens=LENGTHS.max_response_tokens,
        seed=random.Random(seed).getrandbits(63),
    )
    return tokenizer.batch_decode([completion.tokens for completion in completions], skip_special_tokens=True)


@dataclass(frozen=True)
class Measured:
    """What the evaluation needs of a model: its answers to the evaluation's prompts, and more."""

    answers: list[str]
    parameters: int
    pretraining_loss: float
    """Nats per token of held-out documents."""


def measure(config: DemoConfig, data: Data, chunks: Tensor, name: str, path: Path) -> Measured:
    """Measures a model; ``chunks`` are the held-out documents."""
    answers = sample_texts(path, [instruction.prompt for instruction in data.evaluation], f"{name} {config.seed}")
    model = LanguageModel.load(str(path)).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measured(answers, parameters, pretraining_loss(model, chunks, 8192, Processes("cpu")))


def few_shot_answers(config: DemoConfig, data: Data, base: Path) -> list[str]:
    """The base's answers at the end of a page of worked examples, as the paper prompted GPT-3."""
    rng = random.Random(f"few shot {config.seed}")
    prompted = [
        answer_page([(shot.prompt, text) for shot, text in rng.sample(data.demonstrations, SHOTS)], instruction.prompt)
        for instruction in data.evaluation
    ]
    # After its answer a prompted base makes up the next question. The completion is the text before that.
    answers = sample_texts(base, prompted, f"few shot {config.seed}")
    return [answer.split(STOP_WORD)[0].strip() for answer in answers]


def evaluate(
    config: DemoConfig, data: Data, measured: dict[str, Measured], few_shot: list[str], reward_model: Path
) -> dict:
    """Computes every figure of the report except the times and the course of the training."""
    output = Path(config.output_dir)
    texts = {name: model.answers for name, model in measured.items()} | {"base_few_shot": few_shot}
    rng = random.Random(f"judges {config.seed}")
    judges = [rng.choice(data.held_out_labellers) for _ in data.evaluation]

    def rate(name: str, baseline: str) -> dict:
        pairs = zip(judges, data.evaluation, texts[name], texts[baseline], strict=True)
        return asdict(win_rate([judge.prefers(instruction, a, b) for judge, instruction, a, b in pairs]))

    losses = {name: model.pretraining_loss for name, model in measured.items()}
    return {
        "seed": config.seed,
        "parameters": {"small": measured["base"].parameters, "large": measured["large_base"].parameters},
        "labeller_agreement": agreement(data.held_out_labellers, held_out_comparisons(output, data)),
        "rm_accuracy": {
            name: rm_accuracy(reward_model, output / f"data/{name}.jsonl")
            for name in ("held_out_rankings", "held_out_labellers")
        },
        "win_rate_vs_sft": {
            name: rate(name, "sft") for name in ("base", "base_few_shot", "large_base", "ppo", "ppo_ptx")
        },
        "win_rate_vs_large_base": {name: rate(name, "large_base") for name in ("sft", "ppo", "ppo_ptx")},
        "pretraining_loss": losses,
        "alignment_tax": {name: losses[name] - losses["base"] for name in ("sft", "ppo", "ppo_ptx")},
        "gold": {
            name: mean_gold(data, data.evaluation, answers) for name, answers in texts.items()
        },
        "samples": [
            {"prompt": instruction.prompt, **{name: answers[i] for name, answers in texts.items()}}
            for i, instruction in enumerate(data.evaluation[:8])
        ],
    }  # fmt: skip


def course(directory: Path, data: Data) -> list[dict]:
    """Reward and KL over training, and the mean gold utility of the policies that were kept on the way."""
    records = {record["step"] + 1: record for record in read_metrics(directory / "metrics.jsonl")}
    points = [{"iteration": step, "reward": r["reward"], "kl": r["kl"]} for step, r in records.items()]
    some = data.evaluation[:300]
    for path in sorted(directory.glob("iteration-*")):
        texts = sample_texts(path, [instruction.prompt for instruction in some], path.name)
        point = next(point for point in points if point["iteration"] == int(path.name[-6:]))
        point["gold"] = mean_gold(data, some, texts)
    return points


def mean_gold(data: Data, instructions: list[Instruction], texts: list[str]) -> float:
    """The mean gold utility of the answers: what the average labeller thinks of them, without noise."""
    return statistics.fmean(gold_utility(data.world, i, text) for i, text in zip(instructions, texts, strict=True))


def held_out_comparisons(output: Path, data: Data) -> list[tuple[Instruction, list[str]]]:
    """The held-out prompts with the completions that were ranked."""
    by_prompt = {instruction.prompt: instruction for instruction in data.ranked_held_out}
    records = read_comparisons([str(output / "data/held_out_rankings.jsonl")])
    return [(by_prompt[str(record.prompt)], list(map(str, record.completions))) for record in records]


def rm_accuracy(path: Path, comparisons: Path) -> float:
    """The reward model's accuracy on a file of rankings."""
    tokenizer, model = load_tokenizer(str(path)), ScalarModel.load(str(path)).eval()
    limits = Limits(**asdict(LENGTHS), context_length=CONTEXT)
    examples = tokenize_comparisons(read_comparisons([str(comparisons)]), tokenizer, limits)
    return reward.ranking_accuracy(model, examples, 8192)


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices clearly faster than float32 ones.

    It is timed, which takes milliseconds: some processors have the instructions, and are slower with them.
    """
    if torch.cuda.is_available():
        return True

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(256, 256, dtype=dtype)
        runs = []
        for _ in range(5):
            begin = time.perf_counter()
            matrix @ matrix
            runs.append(time.perf_counter() - begin)
        return min(runs)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


class Clock:
    """How long each step took, summed over all resumptions of the experiment."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``name``."""
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
        write_whole(self.path, json.dumps(self.seconds, indent=2))

    def total(self) -> float:
        """Seconds of all steps together."""
        return sum(self.seconds.values())
