"""The sizes of the miniature. The stages keep the paper's settings except for those that experiment.py sets."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.settings import Settings, check


@dataclass
class DemoConfig(Settings):
    """The paper's experiment in miniature, in a generated world, on two CPU cores; nothing is downloaded."""

    output_dir: str = "runs/demo"
    """Everything goes here; report.md and report.json are the result."""
    seed: int = 0
    """Draws the world's facts, the labellers, the data and every model's initial weights."""
    documents: int = 40_000
    """Pretraining documents: about two million tokens."""
    small_steps: int = 1_800
    """Pretraining steps of the small model, of 32 × 128 tokens: enough to learn to take names from the prompt."""
    large_width: int = 336
    """Width of the large base model, of 6 layers: 100 times the parameters of the small one (48 wide, 2 layers)."""
    large_steps: int = 800
    """Pretraining steps of the large model, of 8 × 128 tokens."""
    demonstrations: int = 500
    """Demonstrations written by (fallible) labellers."""
    ranked_prompts: int = 4_000
    """Prompts whose K = 4 to 9 completions were ranked."""
    ppo_prompts: int = 3_000
    """Prompts that PPO samples from."""
    ppo_iterations: int = 40
    """PPO iterations, of 512 episodes."""
    evaluation_prompts: int = 1_000
    """Prompts of the win rates; no stage has seen them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if name not in ("output_dir", "seed"):
                check(value > 0, name, value, "at least 1")
