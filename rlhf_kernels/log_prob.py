"""Log-probabilities of chosen tokens, and the entropy of their distributions, from logits."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import dispatch


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:
    """log p(index) under softmax(logits / temperature), without holding the log-softmax.

    log p_i = l_i/τ − logsumexp(l/τ): the per-token log π(y_t | x, y_<t) of Ouyang et al. 2022, equation 2.
    Differentiable in ``logits``. Banned tokens (logits of −inf) have probability 0.

    Args:
        logits: (..., V) float32, bfloat16, float16 (or float64); any strides with a unit last stride.
        index: (...) int64 or int32, in [0, V) where the row counts.
        temperature: τ > 0.
        row_mask: (...) bool or {0, 1}; a row of 0 is not read, gives 0 and zero gradient. None: every row counts.
        ignore_index: rows with this index are treated as masked.
        inplace_backward: write the gradient over the storage of ``logits``, which must not be used again; a second
            backward pass raises RuntimeError. For logits that are the output of a matmul, say, and that no other op
            keeps for its own backward.

    Returns:
        (...) float32 (float64 for float64 logits) log-probabilities, in nats.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype not listed above.
        ValueError: shapes or devices differ, ``temperature`` is not above 0, ``row_mask`` holds something besides 0 and
            1 (looked at on the CPU only), or ``inplace_backward`` has no storage it may write to: ``logits`` is a leaf
            that requires a gradient, or expanded, so that rows share memory.
        IndexError: an index out of range (on the CPU; on a GPU its row gives NaN).
    """
    wanted = _check(logits, index, temperature, row_mask, ignore_index, inplace_backward)
    op = dispatch("log_prob", "selective_log_softmax_and_entropy", logits.device)
    return op(logits, index, wanted, temperature, inplace_backward, with_entropy=False)[0]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_log_softmax`, and the entropy H = logsumexp(l/τ) − Σ p·l/τ of each row, from the same pass.

    Differentiable in both outputs. Arguments and errors are those of :func:`selective_log_softmax`.

    Returns:
        Two (...) float32 (float64 for float64 logits) tensors: log-probabilities and entropies, in nats.
    """
    wanted = _check(logits, index, temperature, row_mask, ignore_index, inplace_backward)
    op = dispatch("log_prob", "selective_log_softmax_and_entropy", logits.device)
    return op(logits, index, wanted, temperature, inplace_backward, with_entropy=True)


def _check(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    row_mask: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
) -> Tensor:
    """Checks the arguments, and returns which rows count."""
    checks.tensor("logits", logits, checks.FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: has shape {tuple(logits.shape)}, must be (..., V) with V at least 1")
    checks.number("temperature", temperature, 0.0, exclusive_low=True)
    checks.boolean("inplace_backward", inplace_backward)
    if inplace_backward:
        if logits.requires_grad and logits.is_leaf:
            raise ValueError(
                "logits: is a leaf that requires a gradient, must be the output of an op for inplace_backward"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
            raise ValueError(
                f"logits: has strides {logits.stride()}, so that entries share memory, must not for inplace_backward"
            )
    return wanted_rows(index, logits, logits.shape[:-1], logits.shape[-1], row_mask, ignore_index)


def wanted_rows(
    index: Tensor, like: Tensor, rows: tuple[int, ...], size: int, row_mask: Tensor | None, ignore_index: int
) -> Tensor:
    """Checks ``index`` and ``row_mask``, and returns the bool mask of rows that count."""
    checks.tensor("index", index, checks.INDICES, like)
    checks.shape("index", index, rows, "one entry per row")
    checks.integer("ignore_index", ignore_index)
    wanted = (index != ignore_index) & checks.mask("row_mask", row_mask, like, rows)
    checks.index_range("index", index, size, wanted)
    return wanted
