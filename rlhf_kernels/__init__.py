"""Fused kernels for RLHF: token log-probs, sampling, KL-shaped rewards, GAE, PPO losses, pairwise ranking loss.

Every function here checks its arguments, then runs on the backend that :mod:`rlhf_kernels.backends` chooses. The
``reference`` backend is plain PyTorch and defines what every other backend must compute. Needs torch alone.
"""

from rlhf_kernels.backends import available_backends, use_backend
from rlhf_kernels.gae import masked_gae, ppo_advantages
from rlhf_kernels.kl_reward import kl_penalty, kl_shaped_rewards
from rlhf_kernels.linear_log_prob import (
    linear_cross_entropy,
    linear_ppo_policy_loss,
    linear_selective_log_softmax,
    linear_selective_log_softmax_and_entropy,
)
from rlhf_kernels.log_prob import selective_log_softmax, selective_log_softmax_and_entropy
from rlhf_kernels.packing import pack_sequences
from rlhf_kernels.ppo_loss import ppo_policy_loss, ppo_value_loss
from rlhf_kernels.ranking_loss import pairwise_ranking_loss
from rlhf_kernels.registration import register_triton
from rlhf_kernels.sampling import sample_tokens

register_triton()

__version__ = "0.1.0"

__all__ = [
    "available_backends",
    "kl_penalty",
    "kl_shaped_rewards",
    "linear_cross_entropy",
    "linear_ppo_policy_loss",
    "linear_selective_log_softmax",
    "linear_selective_log_softmax_and_entropy",
    "masked_gae",
    "pack_sequences",
    "pairwise_ranking_loss",
    "ppo_advantages",
    "ppo_policy_loss",
    "ppo_value_loss",
    "sample_tokens",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "use_backend",
]
