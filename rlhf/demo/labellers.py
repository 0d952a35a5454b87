"""The labellers: what they value, how they differ, and how often they slip.

All labellers value the same qualities of an answer, but each weighs them by tastes of their own, and every judgement
carries noise. Tastes and noise are set so that two labellers agree on about 73 % of the pairs, as the paper's did
(Ouyang et al. 2022, section 3.4). Noise depends only on labeller, prompt and text, so the whole experiment follows from
its seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from rlhf.demo.world import Instruction, World

WEIGHTS = {
    "follows": 1.5,
    "truthful": 2.0,
    "detail": 1.0,
    "fluent": 1.5,
    "polite": 1.0,
    "rude": -2.0,
    "off_topic": -1.0,
    "long_winded": -1.5,
}
TASTE = 0.3
"""Standard deviation of the log of a labeller's own factor on each weight."""
NOISE = 1.2
"""Standard deviation of one judgement's error, in units of utility."""


def gold_utility(world: World, instruction: Instruction, completion: str) -> float:
    """How good a completion is to the average labeller, without noise: between about -4.5 and 7."""
    assessment = vars(world.assess(instruction, completion))
    return sum(weight * assessment[name] for name, weight in WEIGHTS.items())


class Labeller:
    """One person: ranks completions, or prefers one of two."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        rng = random.Random(f"tastes of {name}")
        self.weights = {quality: weight * rng.lognormvariate(0, TASTE) for quality, weight in WEIGHTS.items()}

    def utility(self, instruction: Instruction, completion: str) -> float:
        """How good this labeller finds a completion, noise included."""
        assessment = vars(self.world.assess(instruction, completion))
        text = " ".join(completion.split())
        slip = random.Random(f"{self.name} / {instruction.prompt} / {text}").gauss(0, NOISE)
        return sum(weight * assessment[quality] for quality, weight in self.weights.items()) + slip

    def rank(self, instruction: Instruction, completions: Sequence[str]) -> list[int]:
        """The rank of each completion, 1 for the best. Equal texts are tied."""
        utilities = [self.utility(instruction, completion) for completion in completions]
        return [1 + sum(other > own for other in utilities) for own in utilities]

    def prefers(self, instruction: Instruction, a: str, b: str) -> float:
        """1 if ``a`` is better, 0 if ``b`` is, 0.5 for the same text."""
        first, second = self.utility(instruction, a), self.utility(instruction, b)
        return 0.5 if first == second else float(first > second)


def hire(world: World, count: int, seed: int) -> list[Labeller]:
    """Labellers of one seed."""
    return [Labeller(world, f"labeller {seed}.{number}") for number in range(count)]


def agreement(labellers: Sequence[Labeller], comparisons: Sequence[tuple[Instruction, Sequence[str]]]) -> float:
    """How often two labellers order a pair of completions alike, over neighbouring pairs of labellers."""
    agreed = total = 0
    for number, (instruction, completions) in enumerate(comparisons):
        one, other = labellers[number % len(labellers)], labellers[(number + 1) % len(labellers)]
        for a, b in itertools.combinations(dict.fromkeys(completions), 2):
            agreed += one.prefers(instruction, a, b) == other.prefers(instruction, a, b)
            total += 1
    return agreed / total
