"""The table of ops. Every other list of ops is made from it, or compared with it by ``tests/kernels/test_ops.py``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Op:
    """What there is to know of an op besides its schema (``csrc/schemas.h``). The CPU and Triton have every op."""

    family: str
    """Its family, which is the name of its files."""
    on_gpu: tuple[str, ...]
    """The backends that have it for GPUs. The first one that an install has is used."""
    statistics: tuple[str, ...] = ()
    """The names of its statistics, in the order in which it returns them in one tensor."""
    derivative: tuple[str, ...] = ()
    """The further ops that its derivative runs."""

    def named(self, statistics: Tensor) -> dict[str, Tensor]:
        """The statistics by name, as scalars."""
        return dict(zip(self.statistics, statistics.unbind()))  # noqa: B905, which takes a third longer


# On an H100 the CUDA kernels were faster than Triton's for log-probs and the ranking loss; the other small ops take
# less time than their launch, which is cheaper from C++. The linear family is in Triton only.
BOTH = ("cuda", "triton")
POLICY_STATISTICS = (
    "ratio_mean", "log_ratio_mean", "ratio_max_deviation", "approx_kl", "clip_fraction", "dual_clip_fraction", "ref_kl",
)  # fmt: skip

OPS = {
    "selective_log_softmax": Op(
        "log_prob", BOTH, derivative=("selective_log_softmax_backward", "selective_log_softmax_backward_")
    ),
    "linear_selective_log_softmax": Op(
        "linear_log_prob", ("triton",), derivative=("linear_selective_log_softmax_backward",)
    ),
    "linear_ppo_policy_loss": Op("linear_log_prob", ("triton",), statistics=(*POLICY_STATISTICS, "entropy")),
    "linear_cross_entropy": Op("linear_log_prob", ("triton",)),
    "sample_tokens": Op("sampling", BOTH),
    "kl_penalty": Op("kl_reward", BOTH, derivative=("kl_penalty_backward",)),
    "kl_shaped_rewards": Op("kl_reward", BOTH),
    "masked_gae": Op("gae", BOTH),
    "ppo_advantages": Op("gae", BOTH),
    "ppo_policy_loss": Op("ppo_loss", BOTH, statistics=POLICY_STATISTICS),
    "ppo_value_loss": Op("ppo_loss", BOTH, statistics=("value_mean", "return_mean", "clip_fraction")),
    "pairwise_ranking_loss": Op("ranking_loss", BOTH),
}  # fmt: skip

FAMILIES = tuple(dict.fromkeys(op.family for op in OPS.values()))
