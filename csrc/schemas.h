// Every op's schema. `mask` is bool or {0, 1} of any dtype, or none: then every entry counts. On the CPU the op checks that, as
// it does index, labels and boundaries; on a GPU nothing is looked at, and an entry that is not 0 counts. A row whose index
// (or label) is ignore_index does not count either.
#pragma once

#include <torch/csrc/stable/library.h>

namespace rlhf_kernels {

inline void define_ops(torch::stable::detail::StableLibrary& library) {
  library.def(
      "selective_log_softmax(Tensor logits, Tensor index, Tensor? mask, int? ignore_index, float temperature, "
      "bool with_entropy, bool inplace_backward) -> "
      "(Tensor logprobs, Tensor entropies, Tensor maxima, Tensor log_sums)");
  library.def(
      "selective_log_softmax_backward(Tensor logits, Tensor index, Tensor? mask, int? ignore_index, float temperature, "
      "Tensor entropies, Tensor maxima, Tensor log_sums, Tensor grad_logprobs, Tensor? grad_entropies) -> Tensor");
  library.def(
      "selective_log_softmax_backward_(Tensor(a!) logits, Tensor index, Tensor? mask, int? ignore_index, float temperature, "
      "Tensor entropies, Tensor maxima, Tensor log_sums, Tensor grad_logprobs, Tensor? grad_entropies) -> ()");
  library.def(
      "linear_selective_log_softmax(Tensor hidden, Tensor weight, Tensor index, Tensor? mask, int? ignore_index, Tensor? bias, "
      "float temperature, float? softcap, bool with_entropy) -> "
      "(Tensor logprobs, Tensor entropies, Tensor maxima, Tensor log_sums)");
  library.def(
      "linear_selective_log_softmax_backward(Tensor hidden, Tensor weight, Tensor index, Tensor? mask, "
      "int? ignore_index, Tensor? bias, float temperature, float? softcap, Tensor entropies, Tensor maxima, Tensor log_sums, Tensor grad_logprobs, "
      "Tensor? grad_entropies, bool needs_hidden, bool needs_weight) -> "
      "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  library.def(
      "linear_ppo_policy_loss(Tensor hidden, Tensor weight, Tensor index, Tensor? old_logprobs, Tensor advantages, "
      "Tensor? mask, Tensor? bias, float temperature, float? softcap, Tensor? ref_logprobs, float beta, "
      "float clip_low, float clip_high, float? dual_clip, float? log_ratio_clamp, bool cispo, "
      "float entropy_coefficient, str reduction, float? denominator, bool needs_hidden, bool needs_weight) -> "
      "(Tensor loss, Tensor statistics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  library.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, Tensor? bias, "
      "float temperature, float? softcap, bool mean, bool needs_hidden, bool needs_weight) -> "
      "(Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  // Of stream and step either may be an int64 scalar on the CPU: one for all rows.
  library.def(
      "sample_tokens(Tensor logits, Tensor stream, Tensor step, int seed, float temperature) -> "
      "(Tensor tokens, Tensor logprobs)");
  library.def("kl_penalty(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str estimator) -> Tensor");
  library.def(
      "kl_penalty_backward(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str estimator, Tensor gradient) -> "
      "Tensor");
  library.def(
      "kl_shaped_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, float beta, "
      "str estimator, float? score_clip) -> (Tensor rewards, Tensor kl)");
  library.def(
      "masked_gae(Tensor rewards, Tensor values, Tensor? mask, float gamma, float lam, Tensor? bootstrap, "
      "str? whiten, Tensor? cu_seqlens) -> (Tensor advantages, Tensor returns)");
  library.def(
      "ppo_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor? mask, float beta, "
      "float gamma, float lam, str? whiten, Tensor? bootstrap, str estimator, float? score_clip, "
      "Tensor? cu_seqlens) -> (Tensor advantages, Tensor returns, Tensor rewards, Tensor kl)");
  library.def(
      "ppo_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? ref_logprobs, "
      "float beta, float clip_low, float clip_high, float? dual_clip, float? log_ratio_clamp, bool cispo, "
      "bool by_sequence, str reduction, float? denominator, bool with_gradient) -> "
      "(Tensor loss, Tensor statistics, Tensor gradient)");
  library.def(
      "ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, float? clip_range, "
      "str reduction, float? denominator, bool with_gradient) -> (Tensor loss, Tensor statistics, Tensor gradient)");
  library.def(
      "pairwise_ranking_loss(Tensor scores, Tensor ranks, Tensor? offsets, Tensor? mask, float margin, "
      "bool with_gradient) -> (Tensor loss, Tensor accuracy, Tensor gradient)");
}

}  // namespace rlhf_kernels
