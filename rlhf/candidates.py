"""The models that `rlhf evaluate` compares, each with its tokenizer, its family and the prefix before its prompts."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf import encoder_decoder
from rlhf.config import EvaluateConfig, GenerateConfig, LengthConfig
from rlhf.data import Limits, PromptExample, PromptRecord, tokenize_prompts
from rlhf.encoder_decoder import EncoderDecoder
from rlhf.fields import DataError
from rlhf.loading import (
    ModelError,
    check_embedded,
    check_same_tokenizer,
    context_length,
    end_token_ids,
    is_classifier,
    load_config,
    load_tokenizer,
    name_of,
    other_tokenizer,
)
from rlhf.models import LanguageModel
from rlhf.objects import described, is_model
from rlhf.processes import Processes
from rlhf.rewards import decode
from rlhf.rollout import NotFiniteError, sample
from rlhf.settings import ConfigError, check
from rlhf.sharding import place
from rlhf.turns import Prompt


@dataclass(frozen=True)
class Candidate:
    """A model that is compared, or generates. Its weights are read when it is its turn."""

    name: str
    """In tables."""
    source: Any
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    """The tokens that end its completions."""
    context: int
    """How many tokens it can see."""
    prefix: str = ""
    """Text before every prompt, of few-shot examples for instance."""
    is_encoder_decoder: bool = False

    @classmethod
    def of(cls, name: str, source: Any, tokenizer: Any | None, prefix: str = "") -> Candidate:
        """A model and what is beside it. A tokenizer that is given has to be the model's."""
        config = load_config(source)
        if is_classifier(config):
            raise ModelError(f"{name}: is a reward model, which writes nothing")
        found = load_tokenizer(tokenizer or source)
        if tokenizer is not None:
            check_same_tokenizer(found, name_of(tokenizer), source)
        encodes = bool(config.is_encoder_decoder)
        ends = frozenset({found.eos_token_id}) if encodes else end_token_ids(source, found)
        length, context = len(found(prefix).input_ids) if prefix else 0, context_length(config)
        if length >= context:
            raise ConfigError(f"prefix: has {length} tokens for {name}, whose context is {context}")
        return cls(name, source, found, ends, context, prefix, encodes)

    def shares_tokens(self, other: Candidate) -> bool:
        """Whether both give probabilities to the same tokens, so that these can be compared."""
        if self.is_encoder_decoder or other.is_encoder_decoder:
            return False
        return other_tokenizer(self.tokenizer, other.tokenizer) is None

    def read(self, records: Sequence[PromptRecord], lengths: LengthConfig) -> list[PromptExample]:
        """The prompts in the model's tokens, with its prefix. Those over the limit without it are left out."""
        try:
            examples = self._read(records, lengths)
        except DataError as error:
            raise DataError(f"{error} ({self.name})") from error
        check_embedded(self.tokenizer, (example.group for example in examples), self.source)
        return examples

    def _read(self, records: Sequence[PromptRecord], lengths: LengthConfig) -> list[PromptExample]:
        context = self.context
        if self.is_encoder_decoder:
            longest = lengths.max_response_tokens
            check(longest <= context, "lengths.max_response_tokens", longest, f"at most {context} for {self.name}")
            most = min(lengths.max_prompt_tokens, context)
            return encoder_decoder.encode_prompts(records, self.tokenizer, most, self.prefix)
        examples = tokenize_prompts(records, self.tokenizer, Limits(**asdict(lengths), context_length=context))
        if not self.prefix:
            return examples
        kept = among(records, examples)
        prefixed = [replace(record, prompt=with_prefix(record.prompt, self.prefix)) for record in kept]
        whole = Limits(context, lengths.max_response_tokens, context)  # none is left out for its length now
        found = tokenize_prompts(prefixed, self.tokenizer, whole)
        return [PromptExample(e.prompt_ids, record.prompt, e.extra) for e, record in zip(found, kept, strict=True)]

    def load(self, config: EvaluateConfig | GenerateConfig, processes: Processes) -> LanguageModel | EncoderDecoder:
        """The weights: whole in every process or, of a causal model, split over them."""
        if self.is_encoder_decoder:
            return EncoderDecoder.load(self.source, self.name, processes.device)
        return place(LanguageModel.load(self.source, device=processes.device).eval(), config.sharding, processes)

    def text(self, response: Sequence[int]) -> str:
        """A completion as text, without the token that ended it."""
        return decode(self.tokenizer, response, self.ends)


def among(records: Sequence[PromptRecord], examples: Sequence[PromptExample]) -> list[PromptRecord]:
    """The records that the examples were made of, in order."""
    made = {id(example.extra) for example in examples}  # a record's own dict
    return [record for record in records if id(record.extra) in made]


def with_prefix(prompt: Prompt, prefix: str) -> Prompt:
    """A prompt after a prefix, which is text before a text, and what the system says before messages."""
    if isinstance(prompt, str):
        return prefix + prompt
    if prompt[0]["role"] == "system":
        return [{**prompt[0], "content": f"{prefix}\n\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": prefix}, *prompt]


def read_prefix(setting: str, path: str | None) -> str:
    """The text of a prefix's file, as it is."""
    if not path:
        return ""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {path} can't be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"{setting}: {path} is empty")
    return text


def sources_of(models: Any) -> list[Any]:
    """Several models from one setting: a list, or a pattern such as ``runs/ppo/iteration-*``."""
    found: list[Any] = []
    for model in models if isinstance(models, list) else [models]:
        if isinstance(model, str) and any(sign in model for sign in "*?[") and not Path(model).exists():
            matches = sorted(path for path in glob.glob(model) if Path(path).is_dir())
            if not matches:
                raise ModelError(f"{model}: no directory has such a name")
            found += matches
        else:
            found.append(model)
    return found


def candidates(config: EvaluateConfig) -> list[Candidate]:
    """The models of an evaluation, and last the baseline."""
    sources = sources_of(config.model)
    prefixes = config.prefix if isinstance(config.prefix, list) else [config.prefix] * len(sources)
    if len(prefixes) != len(sources):
        counts = f"there are {len(prefixes)} for {len(sources)} models"
        raise ConfigError(f"prefix: {counts}; give one for all, or one for each, '' for none")
    given = [(source, "prefix", path) for source, path in zip(sources, prefixes, strict=True)]
    found: dict[str, Candidate] = {}
    for source, setting, path in [*given, (config.baseline, "baseline_prefix", config.baseline_prefix)]:
        text = read_prefix(setting, path)
        plain = str(described(source)) if is_model(source) else name_of(source)
        plain += f" after {path}" if text and (config.prompts or config.tasks) else ""
        names = (f"{plain} ({number})" if number > 1 else plain for number in itertools.count(1))
        name = next(name for name in names if name not in found)
        found[name] = Candidate.of(name, source, config.tokenizer, text)
    return list(found.values())


def prompts_of_all(
    records: Sequence[PromptRecord], readers: Sequence[Any], lengths: LengthConfig
) -> list[list[PromptExample]]:
    """What each reader makes of the prompts that are within the limits of all."""
    read = []
    for reader in readers:
        read.append(reader.read(records, lengths))
        records = among(records, read[-1])
    kept = {id(record.extra) for record in records}
    return [[example for example in examples if id(example.extra) in kept] for examples in read]


def sample_all(
    candidate: Candidate,
    model: LanguageModel | EncoderDecoder,
    ids: list[list[int]],
    config: EvaluateConfig | GenerateConfig,
    processes: Processes,
) -> list[list[int]]:
    """One completion per prompt, as token ids. Each process samples its share."""
    share, streams = processes.share(ids), processes.share(range(len(ids)))
    limits: dict[str, Any] = {
        "streams": streams,
        "end_token_ids": candidate.ends,
        "max_new_tokens": config.lengths.max_response_tokens,
        "temperature": config.temperature,
        "batch_size": config.batch_size,
        "seed": config.seed,
    }
    try:
        if isinstance(model, EncoderDecoder):
            return processes.joined(model.sample(share, **limits))
        return processes.joined([completion.tokens for completion in sample(model, share, **limits)])
    except NotFiniteError as error:
        raise ModelError(f"{candidate.name}: {error}; was its training run stopped at a NaN?") from error
