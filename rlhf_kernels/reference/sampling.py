"""The first token at which the cumulated probability is above a random number; Philox-4x32-10 gives that number."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.reference.log_prob import selective_log_softmax_and_entropy

WORD = 0xFFFFFFFF


def sample_tokens(logits: Tensor, stream: Tensor, step: Tensor, seed: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs; −1 and NaN where a row has no distribution."""
    scaled = logits.double() / (temperature or 1.0)
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()  # NaN where a logit is NaN or +inf, or all are −inf
    cumulated = weights.cumsum(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)  # of equal ones the first
    else:
        target = uniform(seed, stream.long(), step.long())[..., None] * cumulated[..., -1:]
        places = torch.arange(logits.shape[-1], device=logits.device)
        passes = (cumulated > target) & (weights > 0)
        first = torch.where(passes, places, logits.shape[-1]).amin(-1)
        last = torch.where(weights > 0, places, 0).amax(-1)  # where rounding leaves no token that passes
        tokens = torch.minimum(first, last)
    drawn = cumulated[..., -1].isfinite()
    every = torch.ones_like(drawn)
    logprobs, _ = selective_log_softmax_and_entropy(
        logits, torch.where(drawn, tokens, 0), every, temperature or 1.0, inplace_backward=False, with_entropy=False
    )
    return torch.where(drawn, tokens, -1), torch.where(drawn, logprobs, torch.nan)


def uniform(seed: int, stream: Tensor, step: Tensor) -> Tensor:
    """(2k + 1)·2⁻⁵³ with the 52 highest of the 64 bits that words 1 and 0 make as k, so never 0 or 1. float64."""
    words = philox(seed, [stream & WORD, (stream >> 32) & WORD, step & WORD, (step >> 32) & WORD])
    bits = (words[1] << 20) | (words[0] >> 12)
    return (bits.double() + 0.5) * 2.0**-52


def philox(seed: int, counter: list[Tensor]) -> list[Tensor]:
    """The four words of Philox-4x32-10 (Salmon et al. 2011, section 3.3), in int64 as the counter's."""
    keys = [seed & WORD, (seed >> 32) & WORD]
    c = counter
    for _ in range(10):
        high_0, low_0 = _product(c[0], 0xD2511F53)
        high_1, low_1 = _product(c[2], 0xCD9E8D57)
        c = [high_1 ^ c[1] ^ keys[0], low_1, high_0 ^ c[3] ^ keys[1], low_0]
        keys = [(keys[0] + 0x9E3779B9) & WORD, (keys[1] + 0xBB67AE85) & WORD]
    return c


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product. An int64 has too few bits for it, so the factor goes in two halves."""
    low = word * (factor & 0xFFFF)
    upper = word * (factor >> 16) + (low >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (low & 0xFFFF)
