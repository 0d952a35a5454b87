"""The sizes of the miniature. The recipe's own settings keep the paper's values unless a line here says otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import check


@dataclass
class DemoConfig:
    """The paper's experiment in miniature, in a generated world, on two CPU cores; nothing is downloaded."""

    output_dir: str = "runs/demo"
    """Everything goes here; report.md and report.json are the result."""
    seed: int = 0
    """Draws the world's facts, the labellers, the data and every model's initial weights."""
    small_width: int = 48
    """Width of the small model, the one that is aligned."""
    small_layers: int = 2
    """Its layers."""
    large_width: int = 336
    """Width of the large base model: at least 100 times the parameters."""
    large_layers: int = 6
    """Its layers."""
    documents: int = 40_000
    """Pretraining documents."""
    small_steps: int = 1_500
    """Pretraining steps of the small model, of 64 × 128 tokens."""
    large_steps: int = 200
    """Pretraining steps of the large model, likewise."""
    demonstrations: int = 500
    """Demonstrations written by (fallible) labellers."""
    ranked_prompts: int = 1_500
    """Prompts whose K = 4 to 9 completions were ranked."""
    ppo_prompts: int = 8_000
    """Prompts PPO samples from."""
    ppo_iterations: int = 60
    """Iterations of 512 episodes."""
    evaluation_prompts: int = 1_000
    """Prompts of the win rates; no stage has seen them."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("output_dir", "seed"):
                check(value > 0, name, value, "at least 1")
