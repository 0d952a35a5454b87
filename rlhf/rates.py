"""Figures with their 95 % intervals: shares of wins and of agreement, and differences of marks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

Z = 1.96
"""Standard errors on either side of a 95 % interval."""


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % confidence interval."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}]"


def win_rate(outcomes: Sequence[float]) -> Rate:
    """The mean of independent outcomes in {0, 0.5, 1} and Wilson's score interval for it."""
    if not outcomes:
        raise ValueError("outcomes: is empty; a win rate needs at least one comparison")
    return wilson(sum(outcomes) / len(outcomes), len(outcomes))


def wilson(rate: float, n: float) -> Rate:
    """Wilson's score interval for a share among ``n``."""
    centre = (rate + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    return Rate(rate, max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """The mean of a − b over pairs that do not depend on each other, ± 1.96 of its standard error."""
    n = len(pairs)
    if n < 2:
        raise ValueError(f"pairs: there are {n}; an interval of differences needs at least two")
    mean = sum(a - b for a, b in pairs) / n
    half = Z * math.sqrt(sum((a - b - mean) ** 2 for a, b in pairs) / (n * (n - 1)))
    return Difference(mean, mean - half, mean + half)


def agreed_pairs(first: Sequence[int], second: Sequence[int]) -> tuple[int, int]:
    """Of two rankings of the same completions: pairs in the same order, and pairs that neither of them tied."""
    agreed = counted = 0
    for i, j in combinations(range(len(first)), 2):
        one, other = first[i] - first[j], second[i] - second[j]
        if one and other:
            counted += 1
            agreed += (one > 0) == (other > 0)
    return agreed, counted


Ranks: TypeAlias = Sequence[int]


def agreement(prompts: Iterable[Iterable[tuple[Ranks, Ranks]]]) -> Rate | None:
    """How often labellers agree which of two completions is better (Ouyang et al. 2022, section 3.4: 72.6 ± 1.5 %).

    Counted are all pairs of completions of a prompt, for all pairs of labellers who ranked it, where neither of the two
    labellers tied the pair. Pairs of one prompt depend on each other. With a_p agreed of n_p counted pairs in prompt p,
    rate r = Σa/Σn and m prompts, the variance is s² = m/(m−1) · Σ (a_p − r·n_p)² / (Σn)² (a ratio of sums over
    clusters: Cochran 1977, equation 2.46). The interval is Wilson's for so many independent pairs as have that
    variance, r(1−r)/s², and for m of them where r is 0 or 1, since all then agree that there is none.

    Args:
        prompts: for each prompt, pairs of labellers' rankings of its completions.

    Returns:
        None if fewer than two prompts have pairs to count.
    """
    counts = []
    for pairs in prompts:
        found = [agreed_pairs(one, other) for one, other in pairs]
        agreed, counted = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0)
        if counted:
            counts.append((agreed, counted))
    m = len(counts)
    if m < 2:
        return None
    total = sum(counted for _, counted in counts)
    rate = sum(agreed for agreed, _ in counts) / total
    variance = m / (m - 1) * sum((agreed - rate * counted) ** 2 for agreed, counted in counts) / total**2
    independent = rate * (1 - rate) / variance if variance else m
    return wilson(rate, min(independent, total))
