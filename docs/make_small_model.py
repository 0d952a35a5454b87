"""A GPT-2-shaped model with random weights, and a byte-level BPE tokenizer trained on the files given.

It gives the trainer's stages something to start from where no model is at hand: docs/instructgpt_data.md.

    python docs/make_small_model.py runs/small/base ../shared/data/instructgpt/*.jsonl ../shared/data/shakespeare.txt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"


def texts(path: Path) -> Iterator[str]:
    """Every string of a JSONL file's records, or the whole of any other file."""
    if path.suffix != ".jsonl":
        yield path.read_text()
        return
    for line in path.read_text().splitlines():
        for value in json.loads(line).values():
            yield from (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))


def main() -> None:
    """Writes the model and its tokenizer to one directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="the directory to write")
    parser.add_argument("data", type=Path, nargs="+", help="JSONL or plain text to train the tokenizer on")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="hidden size (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens the model can see (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the weights (default: %(default)s)")
    options = parser.parse_args()

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (text for path in options.data for text in texts(path)),
        vocab_size=options.vocabulary,
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, model_max_length=options.context
    )
    torch.manual_seed(options.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=options.context,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{options.output}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
