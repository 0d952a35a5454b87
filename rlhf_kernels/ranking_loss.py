"""The reward model's loss over all pairs of each prompt's ranked completions."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import choose
from rlhf_kernels.reference import ranking_loss as reference
from rlhf_kernels.registration import autograd_of_loss, call, fake, needs_gradient

PAIRS = (
    "; for the scores of chosen and of rejected completions: "
    "pairwise_ranking_loss(torch.stack([chosen, rejected], 1), torch.tensor([[1, 2]] * len(chosen)))"
)


def pairwise_ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    *,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    margin: float | None = None,
) -> tuple[Tensor, Tensor]:
    """−1/|pairs| Σ log σ(r_w − r_l) over the pairs of each prompt, then the mean over prompts.

    Ouyang et al. 2022, equation 1. A pair is a completion w and a completion l of the same prompt, where w is ranked
    better. Completions with the same rank make no pair; without such ties |pairs| is C(K, 2). A prompt without a pair
    is left out of the loss, and of the number of prompts in the mean. Differentiable in ``scores``.

    Args:
        scores: (B, K) floating point, one row per prompt; or (N,) flat, with ``offsets``.
        ranks: the same shape, int64 or int32: 1 is best; only the order matters.
        offsets: (B+1,) int64 or int32: where each prompt's completions begin and end among the N.
        mask: (B, K) bool or {0, 1}: which entries are completions, where prompts have fewer than K;
            None: all of them. Not with ``offsets``.
        margin: m ≥ 0 in log σ(r_w − r_l − m), in units of score; 0 by default.

    Returns:
        The scalar loss in nats (0 when there is no pair), and the accuracy: the share of a prompt's pairs whose scores
        are in the order of the ranks, averaged over prompts: 0 when there is no pair, as where all ranks of a batch are
        tied. Equal scores count half, and so do scores of which one is NaN (or both are the same infinity), while the
        loss is NaN then. It carries no gradient.

    Raises:
        TypeError: an argument is not a tensor of a dtype above.
        ValueError: shapes or devices differ, an option is out of range, both ``offsets`` and ``mask`` are given, or
            (looked at on the CPU only) ``mask`` holds something besides 0 and 1, or ``offsets`` don't rise from 0 to N.

    Example:
        >>> pairwise_ranking_loss(torch.tensor([[2.0, 0.5]]), torch.tensor([[1, 2]]))[0]
        tensor(0.2014)
    """
    checks.tensor("scores", scores, checks.FLOATS)
    checks.tensor("ranks", ranks, checks.INDICES, scores, PAIRS)
    checks.shape("ranks", ranks, scores.shape, "the shape of scores")
    dims, form = (2, "(B, K)") if offsets is None else (1, "(N,), since offsets is given")
    if scores.dim() != dims:
        raise ValueError(f"scores: has shape {tuple(scores.shape)}, must be {form}")
    if offsets is not None:
        if mask is not None:
            raise ValueError("mask: is given with offsets, must be None; flat scores have no padding to mask")
        checks.boundaries("offsets", offsets, scores)
    checks.mask("mask", mask, scores, scores.shape)
    margin = 0.0 if margin is None else checks.number("margin", margin, 0.0)
    backend = choose("pairwise_ranking_loss", scores)
    mask = checks.read_mask(backend, "mask", mask, scores)
    offsets = checks.read_boundaries(backend, "offsets", offsets, scores.shape[0])
    arguments = (scores, ranks, offsets, mask, margin)
    if backend == "reference":
        return reference.pairwise_ranking_loss(*arguments)
    loss, accuracy, _ = call(backend, "pairwise_ranking_loss", *arguments, needs_gradient(scores))
    return loss, accuracy


@fake("pairwise_ranking_loss")
def _(
    scores: Tensor, ranks: Tensor, offsets: Tensor | None, mask: Tensor | None, margin: float, with_gradient: bool
) -> tuple[Tensor, ...]:
    shapes = ((), (), scores.shape if with_gradient else (0,))
    return tuple(scores.new_empty(shape, dtype=torch.float32) for shape in shapes)


autograd_of_loss("pairwise_ranking_loss", "scores")
