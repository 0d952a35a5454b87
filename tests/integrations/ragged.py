"""Batches as other trainers hold them, and what they make of them with and without our functions."""

from __future__ import annotations

import torch

B, T, V = 5, 9, 33


def masks():
    """Padding on the right and on the left, holes, an empty row, and everything."""
    right = torch.arange(T) < torch.tensor([9, 5, 1, 7, 3])[:, None]
    holes = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.6
    empty = right.clone()
    empty[2] = False
    everything = torch.ones(B, T, dtype=torch.bool)
    return {"right": right, "left": right.flip(1), "holes": holes, "empty row": empty, "all": everything}


def both(patch, function, path):
    """What a function gives, and what it gives when ours is in the place of the one at ``path``."""
    theirs = function()
    with patch() as patched:
        ours = function()
        assert patched.calls == {path: 1}
    return ours, theirs


def hold(ours, theirs, dtype=torch.float32):
    """Both are the same but for rounding."""
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)


def no_further_from_the_truth(patch, function, logits, path):
    """A function of logits and its gradient: of the same dtypes, and at most as wrong as they were."""

    def run(x=logits):
        result = function(x)
        return result, torch.autograd.grad(result.float().sin().sum(), x)[0]

    ours, theirs = both(patch, run, path)
    exact = run(logits.detach().double().requires_grad_())
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - truth).norm() <= 1.1 * (b - truth).norm() + 1e-5 * truth.norm(), path
