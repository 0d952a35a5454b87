"""Every op as Triton kernels, under the names and signatures of the native ops (csrc/library.cpp).

Imported when the first op runs on this backend: it needs triton, which nothing else here does.
"""

from collections.abc import Callable
from typing import Any

from rlhf_kernels.triton import gae, kl_reward, linear_log_prob, log_prob, ppo_loss, ranking_loss

OPS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        log_prob.selective_log_softmax,
        log_prob.selective_log_softmax_backward,
        log_prob.selective_log_softmax_backward_,
        linear_log_prob.linear_selective_log_softmax,
        linear_log_prob.linear_selective_log_softmax_backward,
        linear_log_prob.linear_ppo_policy_loss,
        linear_log_prob.linear_cross_entropy,
        kl_reward.kl_penalty,
        kl_reward.kl_penalty_backward,
        kl_reward.kl_shaped_rewards,
        gae.masked_gae,
        gae.ppo_advantages,
        ppo_loss.ppo_policy_loss,
        ppo_loss.ppo_value_loss,
        ranking_loss.pairwise_ranking_loss,
    )
}
