"""Log-probabilities of chosen tokens, and the entropy of their distributions, from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import choose
from rlhf_kernels.reference import log_prob as reference
from rlhf_kernels.registration import autograd, call, fake, run_kernel


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    group: Any = None,
) -> Tensor:
    """log p(index) under softmax(logits / temperature), without holding the log-softmax.

    log p_i = l_i/τ − logsumexp(l/τ): the per-token log π(y_t | x, y_<t) of Ouyang et al. 2022, equation 2.
    Differentiable in ``logits``. Banned tokens (logits of −inf) have probability 0.

    Args:
        logits: (..., V) float32, bfloat16, float16 (or float64); any strides with a unit last stride.
        index: (...) int64 or int32, in [0, V) where the row counts.
        temperature: τ > 0.
        mask: (...) bool or {0, 1}; a row of 0 is not read, gives 0 and zero gradient. None: every row counts.
        ignore_index: rows with this index are treated as masked.
        inplace_backward: write the gradient over the storage of ``logits``, which must not be used again; a second
            backward pass raises RuntimeError. Meant for logits that no other op keeps for its own backward, such as the
            output of a matmul.
        group: a ``torch.distributed`` group whose processes each hold an equal part of the vocabulary, in the order of
            their ranks: ``logits`` is (..., V/processes), while ``index``, the same in all, is in [0, V). Results are
            those of the whole vocabulary, float32. None: all of it is here.

    Returns:
        (...) float32 (float64 for float64 logits) log-probabilities, in nats.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype not listed above.
        ValueError: shapes or devices differ, ``temperature`` is not above 0, ``mask`` holds something besides 0 and
            1 or the processes of ``group`` differ (looked at on the CPU only), or ``inplace_backward`` has no storage
            that it may write to: ``logits`` is a leaf that requires a gradient, or expanded, so that rows share memory.
        IndexError: an index out of range (on the CPU; on a GPU its row gives NaN).
        RuntimeError: ``group`` with float64, or on a backend without kernels.
    """
    temperature, ignore_index = _check(logits, index, temperature, mask, ignore_index, inplace_backward)
    return _run(logits, index, mask, ignore_index, temperature, inplace_backward, group, with_entropy=False)[0]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_log_softmax`, and the entropy H = logsumexp(l/τ) − Σ p·l/τ of each row, from the same pass.

    Differentiable in both outputs. Arguments and errors are those of :func:`selective_log_softmax`.

    Returns:
        Two (...) float32 (float64 for float64 logits) tensors: log-probabilities and entropies, in nats.
    """
    temperature, ignore_index = _check(logits, index, temperature, mask, ignore_index, inplace_backward)
    return _run(logits, index, mask, ignore_index, temperature, inplace_backward, group, with_entropy=True)


def _run(
    logits: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int, temperature: float,
    inplace_backward: bool, group: Any, *, with_entropy: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    backend = choose("selective_log_softmax", logits)
    if group is not None:
        from rlhf_kernels import vocabulary_parallel

        return vocabulary_parallel.log_probs(
            logits, index, mask, ignore_index, group, backend, temperature, inplace_backward, with_entropy=with_entropy
        )
    index, mask = read_rows(backend, index, mask, ignore_index, logits.shape[-1])
    if backend == "reference":
        wanted = checks.counted(index, mask, ignore_index)
        return reference.selective_log_softmax_and_entropy(
            logits, index, wanted, temperature, inplace_backward, with_entropy=with_entropy
        )
    logprobs, entropies, _, _ = call(
        backend, "selective_log_softmax", logits, index, mask, ignore_index, temperature, with_entropy, inplace_backward
    )
    return logprobs, entropies


def _check(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    mask: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[float, int]:
    """Returns the temperature and ``ignore_index``."""
    checks.logits(logits)
    temperature = checks.temperature(temperature)
    checks.boolean("inplace_backward", inplace_backward)
    if inplace_backward:
        if logits.requires_grad and (logits.is_leaf or _is_view_of_a_leaf(logits)):
            raise ValueError(
                "logits: is a leaf that requires a gradient, must be the output of an op for inplace_backward"
            )
        if _share_memory(logits):
            raise ValueError(
                f"logits: has strides {logits.stride()}, so that entries share memory, must not for inplace_backward"
            )
    return temperature, check_rows(index, logits, logits.shape[:-1], mask, ignore_index)


def _is_view_of_a_leaf(tensor: Tensor) -> bool:
    """Whether a write into the tensor would be one into a parameter. Compiled code has no views of another's memory."""
    base = None if torch.compiler.is_compiling() else tensor._base
    return base is not None and base.is_leaf and base.requires_grad


def _share_memory(tensor: Tensor) -> bool:
    """Whether two entries may lie at the same place in memory. In slices and transposes of a dense tensor none do."""
    if tensor.numel() == 0:
        return False
    # The strides are compared without sorting them, since compiled code can't sort symbols.
    dims = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(dims):
        within = sum(s * (n - 1) for j, (s, n) in enumerate(dims) if j != i and s <= stride)
        if stride <= within:
            return True
    return False


def check_rows(index: Tensor, like: Tensor, rows: tuple[int, ...], mask: Tensor | None, ignore_index: int) -> int:
    """Checks the arguments that choose rows, and a token in each, except their values; returns ``ignore_index``."""
    checks.tensor("index", index, checks.INDICES, like)
    checks.shape("index", index, rows, "one entry per row")
    checks.mask("mask", mask, like, rows)
    return checks.ignore_index(ignore_index, index)


def read_rows(
    backend: str, index: Tensor, mask: Tensor | None, ignore_index: int, size: int
) -> tuple[Tensor, Tensor | None]:
    """The index and the mask as a backend takes them."""
    mask = None if mask is None else checks.to_be_kept(checks.read_mask(backend, "mask", mask, index))
    return checks.read_index(backend, "index", index, mask, size, ignore_index), mask


# For the derivative the op returns the maximum of each row's logits and log Σ e^((l − max)/τ) as two numbers. The
# logsumexp would be one number, but where logits are large it has lost the digits of the second of these.


@fake("selective_log_softmax")
def _(
    logits: Tensor, index: Tensor, mask: Tensor | None, ignore_index: int | None, temperature: float,
    with_entropy: bool, inplace_backward: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    def per_row() -> Tensor:
        return logits.new_empty(index.shape, dtype=torch.float32)

    return per_row(), per_row() if with_entropy else logits.new_empty(0, dtype=torch.float32), per_row(), per_row()


@fake("selective_log_softmax_backward")
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@fake("selective_log_softmax_backward_")
def _(*_: Any) -> None:
    return None


def _save(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.temperature, ctx.with_entropy, ctx.inplace = inputs.temperature, inputs.with_entropy, inputs.inplace_backward
    ctx.ignore_index = inputs.ignore_index
    _, entropies, maxima, log_sums = output
    ctx.save_for_backward(inputs.logits, inputs.index, inputs.mask, entropies, maxima, log_sums)
    ctx.mark_non_differentiable(maxima, log_sums, *(() if ctx.with_entropy else (entropies,)))
    ctx.set_materialize_grads(False)  # a launch for each result that has no gradient


@autograd("selective_log_softmax", _save, variables=("logits",))
def _backward(
    ctx: Any, saved: tuple[Any, ...], grad_logprobs: Tensor | None, grad_entropies: Tensor | None, *_: Any
) -> dict[str, Tensor | None]:
    logits, index, mask, entropies, maxima, log_sums = saved
    if grad_logprobs is None:
        if grad_entropies is None:
            return {}
        grad_logprobs = torch.zeros_like(maxima)
    arguments = (
        logits, index, mask, ctx.ignore_index, ctx.temperature, entropies, maxima, log_sums, grad_logprobs,
        grad_entropies,
    )  # fmt: skip
    return {"logits": gradient_of_logits(ctx.backend, ctx.inplace, *arguments)}


def gradient_of_logits(backend: str | None, inplace: bool, logits: Tensor, *arguments: Any) -> Tensor:
    """What the backward kernel gives with these arguments, in a new tensor or over the logits."""
    if not inplace:
        return run_kernel(backend, "selective_log_softmax_backward", logits, *arguments)
    run_kernel(backend, "selective_log_softmax_backward_", logits, *arguments)
    # Autograd then refuses a second pass over these logits.
    torch.autograd.graph.increment_version(logits)
    return logits.detach()
