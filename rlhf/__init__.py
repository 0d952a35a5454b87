"""The InstructGPT recipe (Ouyang et al. 2022) on top of ``rlhf_kernels``: SFT, reward model, PPO and PPO-ptx.

Each stage is a module that reads top to bottom: :mod:`rlhf.sft`, :mod:`rlhf.reward`, :mod:`rlhf.ppo`,
:mod:`rlhf.evaluate`. Each has a ``train(config)`` (or ``evaluate(config)``) that the command ``rlhf`` calls, and that
can be called from Python. :mod:`rlhf.label` is the page on which people rank and write. For example::

    import rlhf

    rlhf.sft.train(rlhf.SFTConfig(model="gpt2", data=records, output_dir="runs/sft", adam={"learning_rate": 1e-5}))

From Python, settings may also be objects. A path may be a ``Path``. ``data``, ``prompts`` and the like may be a list of
records (dicts) or a ``datasets.Dataset``. ``model`` and the like may be a model of transformers: a copy of it is
trained, and the object does not change. ``tokenizer`` may be a tokenizer, ``reward`` and ``judge`` may be functions,
and a group of settings may be a dict. Errors are a ``ConfigError``, ``DataError``, ``ModelError`` or ``RunError`` with
a message of one line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhf.config import (
    Adam,
    EvaluateConfig,
    GenerateConfig,
    LabelConfig,
    LengthConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from rlhf.settings import ConfigError

if TYPE_CHECKING:
    from rlhf import evaluate, label, ppo, reward, sft
    from rlhf.checkpoints import RunError
    from rlhf.fields import DataError
    from rlhf.loading import ModelError

STAGES = ("evaluate", "label", "ppo", "reward", "sft")
ERRORS = {"DataError": "rlhf.fields", "ModelError": "rlhf.loading", "RunError": "rlhf.checkpoints"}


def __getattr__(name: str) -> Any:
    """Imports a stage or an error on first use, so that settings and --help do not wait for torch."""
    if name in STAGES:
        return importlib.import_module(f"rlhf.{name}")
    if name in ERRORS:
        return getattr(importlib.import_module(ERRORS[name]), name)
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")


__all__ = [
    "Adam",
    "ConfigError",
    "DataError",
    "EvaluateConfig",
    "GenerateConfig",
    "LabelConfig",
    "LengthConfig",
    "ModelError",
    "PPOConfig",
    "RewardConfig",
    "RunError",
    "SFTConfig",
    "evaluate",
    "label",
    "ppo",
    "reward",
    "sft",
]
