"""The ops written a second time, as loops over Python floats (which are float64), and strategies for their inputs.

They are independent of the package on purpose: no torch arithmetic, and no code shared with any backend.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK_DTYPES = (torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16, torch.float64)


def here(arguments: dict, message: str = "") -> dict:
    """Moves arguments that were made when tests were collected to the device that the test runs on.

    Skips the test on a GPU if its error ``message`` is about a tensor's values, since those are not checked there.
    """
    device = torch.get_default_device()
    if device.type == "cuda" and re.search("at position|goes from|decreases", message):
        pytest.skip("a GPU's values are not looked at")
    made = {k: v() if callable(v) else v for k, v in arguments.items()}  # moving it would change it
    return {k: v.to(device) if isinstance(v, torch.Tensor) and v.is_cpu else v for k, v in made.items()}


def log_softmax(logits: list[float], temperature: float) -> list[float]:
    z = [logit / temperature for logit in logits]
    top = max(z)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in z))
    return [x - log_sum for x in z]


def entropy(log_probs: list[float]) -> float:
    return -math.fsum(math.exp(x) * x for x in log_probs if x != -math.inf)


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Philox-4x32-10 as Salmon et al. 2011 write it: words of 32 bits."""
    (k0, k1), c = key, counter
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b % 2**32, (a >> 32) ^ c[3] ^ k1, a % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def uniform(seed: int, stream: int, step: int) -> float:
    def words(x: int) -> list[int]:
        return [x % 2**32, (x >> 32) % 2**32]

    low, high, _, _ = philox(words(seed), words(stream) + words(step))
    return ((high * 2**32 + low) // 2**12 + 0.5) / 2**52


def chi_square(drawn: list[float], expected: list[float]) -> float:
    """By how many standard deviations the statistic is too large (Wilson and Hilferty 1931).

    Outcomes are put together until at least 20 draws are expected of them.
    """
    statistic, groups, so_far = 0.0, 0, (0.0, 0.0)
    for got, want in sorted(zip(drawn, expected, strict=True), key=lambda pair: pair[1]):
        so_far = (so_far[0] + got, so_far[1] + want)
        if so_far[1] >= 20:
            statistic += (so_far[0] - so_far[1]) ** 2 / so_far[1]
            groups += 1
            so_far = (0.0, 0.0)
    degrees = groups - 1
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def kl(logprob: float, ref: float, estimator: str) -> float:
    d = logprob - ref
    return {"k1": d, "k2": d * d / 2, "k3": math.expm1(-d) + d, "abs": abs(d)}[estimator]


def gae(rewards, values, mask, gamma, lam, bootstrap):
    """One row, as lists. Goes forward over the unmasked positions, and writes each sum out in full."""
    steps = [t for t, m in enumerate(mask) if m]
    following = [values[t] for t in steps[1:]] + [bootstrap]
    deltas = [rewards[t] + gamma * nxt - values[t] for t, nxt in zip(steps, following, strict=True)] if steps else []
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for i, t in enumerate(steps):
        advantages[t] = math.fsum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(steps)))
        returns[t] = advantages[t] + values[t]
    return advantages, returns


def whiten(rows, masks, unbiased=False):
    """Lists of rows, brought to mean 0 and variance 1 over all unmasked positions."""
    flat = [a for row, mask in zip(rows, masks, strict=True) for a, m in zip(row, mask, strict=True) if m]
    if not flat:
        return rows
    mean = math.fsum(flat) / len(flat)
    variance = math.fsum((a - mean) ** 2 for a in flat) / max(1, len(flat) - unbiased)
    return [
        [(a - mean) / math.sqrt(variance + 1e-8) if m else 0.0 for a, m in zip(row, mask, strict=True)]
        for row, mask in zip(rows, masks, strict=True)
    ]


def reduce(losses, mask, reduction):
    """The loss over lists of rows, under one reduction."""
    rows = [[x for x, m in zip(row, mask, strict=True) if m] for row, mask in zip(losses, mask, strict=True)]
    rows = [row for row in rows if row]
    if not rows:
        return 0.0
    if reduction == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if reduction == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / len(rows)


def policy_loss(logprob, old, advantage, low, high, dual_clip):
    """One position: the loss, whether the clipped term is the one chosen, and whether the gradient is gone."""
    ratio = math.exp(logprob - old)
    kept = min(max(ratio, low), high)
    objective = min(ratio * advantage, kept * advantage)
    cut = kept * advantage < ratio * advantage
    if dual_clip is not None and advantage < 0 and objective < dual_clip * advantage:
        return -dual_clip * advantage, cut, True
    return -objective, cut, cut


def value_loss(value, old, target, clip_range):
    error = (value - target) ** 2
    if clip_range is None:
        return error / 2, False
    clipped = (old + min(max(value - old, -clip_range), clip_range) - target) ** 2
    return max(error, clipped) / 2, clipped > error


def ranking(scores, ranks, margin=0.0):
    """One prompt: (loss, accuracy), or None without a pair."""
    losses, right = [], []
    for w, (score_w, rank_w) in enumerate(zip(scores, ranks, strict=True)):
        for score_l, rank_l in (
            list(zip(scores, ranks, strict=True))[:w] + list(zip(scores, ranks, strict=True))[w + 1 :]
        ):
            if rank_w < rank_l:
                x = score_w - score_l - margin
                losses.append(max(-x, 0.0) + math.log1p(math.exp(-abs(x))))
                right.append(1.0 if score_w > score_l else 0.5 if score_w == score_l else 0.0)
    return (sum(losses) / len(losses), sum(right) / len(right)) if losses else None


# ---------------------------------------------------------------------------------------------------- strategies


@st.composite
def batches(draw, max_rows=4, max_length=7):
    """(B, T) and a mask of any dtype, with holes, padding on either side, and rows that are masked whole."""
    rows, length = draw(st.integers(0, max_rows)), draw(st.integers(0, max_length))
    bits = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows))
    mask = torch.tensor(bits, dtype=torch.bool).reshape(rows, length)
    return mask.to(draw(st.sampled_from(MASK_DTYPES)))


def garbage(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """NaN and infinities wherever the mask has 0."""
    rubbish = torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(tensor.numel()) % 3].reshape(tensor.shape)
    return torch.where(mask.bool(), tensor, rubbish.to(tensor.dtype))


@st.composite
def layouts(draw, tensor: torch.Tensor):
    """The same values under other strides: contiguous, a slice of something larger, or transposed in front."""
    kind = draw(st.sampled_from(("contiguous", "slice", "transposed")))
    if kind == "slice" and tensor.dim() >= 2:
        larger = torch.full((*tensor.shape[:-2], tensor.shape[-2] + 1, tensor.shape[-1]), math.nan).to(tensor.dtype)
        larger[..., :-1, :] = tensor
        return larger[..., :-1, :]
    if kind == "transposed" and tensor.dim() >= 3:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.clone()
