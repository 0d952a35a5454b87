"""Lets the tests here import ``ragged`` and the tiny models of the trainer's tests."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "rlhf")]
