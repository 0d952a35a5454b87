"""A language model, a reward model and data of every kind, small enough that a whole stage takes a second."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.config import Adam, EvaluateConfig, LengthConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf.demo.pretrain import make_tokenizer
from rlhf.loading import load_tokenizer
from rlhf.models import LanguageModel, ScalarModel
from rlhf.training import Run

sys.path.insert(0, str(Path(__file__).parent))

from labelling import Server
from tools import WORDS, run_here, tiny_gpt2, write_jsonl

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(WORDS)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """The directory of a causal LM. Its answers end soon, since EOS is a likely token."""
    torch.manual_seed(1)
    model = tiny_gpt2(len(tokenizer), tokenizer.eos_token_id)
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory, base):
    """A reward model's directory, with a random head and a bias."""
    torch.manual_seed(2)
    model = ScalarModel.load(base)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    model.bias = 0.25
    directory = tmp_path_factory.mktemp("reward_model")
    model.save(directory, load_tokenizer(base))
    return str(directory)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Paths of ``demonstrations``, ``comparisons``, ``prompts`` and ``texts``. In all of them a word is followed by the
    next word of ``WORDS``. The best completion of a comparison goes on like that, the others are random."""
    directory = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def run_of(length, first=None):
        first = draw.randrange(len(WORDS)) if first is None else first
        return [WORDS[(first + i) % len(WORDS)] for i in range(length)]

    demonstrations, comparisons, texts = [], [], []
    for first in draw.sample(range(len(WORDS)), 40):
        words = run_of(draw.randint(6, 12), first)
        cut = draw.randint(2, 4)
        demonstrations.append({"prompt": " ".join(words[:cut]), "completion": " ".join(words[cut:])})
    for _ in range(24):
        words = run_of(8)
        count = draw.randint(3, 5)
        wrong = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(count - 1)]
        ranks = [1, *(2 + i // 2 for i in range(count - 1))]
        comparisons.append(
            {"prompt": " ".join(words[:3]), "completions": [" ".join(words[3:]), *wrong], "ranks": ranks}
        )
    for _ in range(30):
        texts.append({"text": " ".join(run_of(draw.randint(10, 30)))})
    prompts = [{"prompt": record["prompt"]} for record in demonstrations]
    return SimpleNamespace(
        demonstrations=write_jsonl(directory / "demonstrations.jsonl", demonstrations),
        comparisons=write_jsonl(directory / "comparisons.jsonl", comparisons),
        prompts=write_jsonl(directory / "prompts.jsonl", prompts),
        texts=write_jsonl(directory / "texts.jsonl", texts),
    )


@pytest.fixture(scope="session")
def lm(base):
    """The base model, loaded."""
    return LanguageModel.load(base).eval()


@pytest.fixture
def sft_config(tmp_path, base, data):
    def make(name="sft", **options):
        defaults = {"epochs": 3, "batch_size": 8, "adam": Adam(3e-3), "pretraining_tokens": 16, "device": "cpu"}
        settings = {"model": base, "data": data.demonstrations} | defaults | options
        return SFTConfig(output_dir=str(tmp_path / name), **settings)

    return make


@pytest.fixture
def reward_config(tmp_path, base, data):
    def make(name="reward", **options):
        settings = {"model": base, "epochs": 3, "batch_size": 8, "adam": Adam(3e-3), "device": "cpu"} | options
        return RewardConfig(output_dir=str(tmp_path / name), **{"data": data.comparisons} | settings)

    return make


@pytest.fixture
def ppo_config(tmp_path, base, reward_model, data):
    def make(name="ppo", **options):
        settings = {
            "policy": base,
            "reward_model": reward_model,
            "episodes": 64,
            "batch_size": 16,
            "minibatch_size": 8,
            "adam": Adam(1e-3, eps=1e-5),
            "value_adam": Adam(1e-3, eps=1e-5),
            "warmup_iterations": 2,
            "lengths": LengthConfig(max_prompt_tokens=16, max_response_tokens=8),
            "pretraining_data": data.texts,
            "pretraining_tokens": 16,
            "pretraining_per_episode": 2,
            "device": "cpu",
        }
        return PPOConfig(output_dir=str(tmp_path / name), **{"prompts": data.prompts} | settings | options)

    return make


@pytest.fixture
def evaluate_config(tmp_path, base, data):
    def make(name="out", **options):
        settings = {"model": base, "baseline": base, "prompts": data.prompts, "device": "cpu", "pretraining_tokens": 16}
        settings["lengths"] = LengthConfig(max_prompt_tokens=16, max_response_tokens=8)
        return EvaluateConfig(output_dir=str(tmp_path / name), **settings | options)

    return make


@pytest.fixture
def open_run():
    """A run on which the functions of a stage can be called one at a time."""

    def make(stage, config):
        return Run(stage, config)

    return make


@pytest.fixture
def rlhf(capfd):
    """Runs the command in this process: ``code, error = rlhf("sft", "--model", ...)``."""

    def run(*arguments):
        capfd.readouterr()
        code = run_here(*arguments)
        out, error = capfd.readouterr()
        run.out = out
        return code, error

    return run


@pytest.fixture
def serve(tmp_path):
    """Starts the page for records: ``serve(records, "--task", "preference")``."""
    started = []

    def start(records, *arguments):
        data = write_jsonl(tmp_path / "data.jsonl", records)
        started.append(Server(tmp_path / "labels", "--data", data, *arguments))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop()
