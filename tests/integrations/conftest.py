"""Lets the tests here import the tiny models of the trainer's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "rlhf"))
