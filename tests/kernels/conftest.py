"""Lets the tests here import ``oracles`` whatever pytest's import mode, and Triton's interpreter scan short blocks."""

import sys
from pathlib import Path

import torch

import rlhf_kernels

sys.path.insert(0, str(Path(__file__).parent))

# The interpreter scans an element at a time, and packed sequences are scanned by the block however short they are. With
# short blocks small inputs reach the code between blocks, too.
if not torch.cuda.is_available() and "triton" in rlhf_kernels.available_backends():
    from rlhf_kernels.triton import gae

    gae.BLOCK = 64
