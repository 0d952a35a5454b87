// PPO's losses, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/ops/mask.h"
#include "cpu/ops/memory.h"
#include "cpu/ops/rows.h"
#include "tensors.h"

namespace rlhf_kernels::cpu::ops {
namespace {

using namespace tensors;

std::tuple<Tensor, Tensor, Tensor> ppo_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                                                   Tensor wanted, double clip_low, double clip_high,
                                                   std::optional<double> dual_clip, std::string reduction,
                                                   bool with_gradient) {
  const Mask mask("mask", wanted);
  const TokenRows rows(logprobs, old_logprobs, advantages, reduction);
  const Weights weights(mask.data(), rows.count, rows.length, rows.positions, reduction);
  Tensor gradient = with_gradient ? empty(sizes(logprobs), ScalarType::Float) : nothing();
  std::vector<PolicySums> sums(rows.count);
  const PolicyArguments in{rows.view(logprobs), rows.view(old_logprobs), rows.view(advantages),
                                mask.data(), rows.length, rows.positions, weights.rows.data(),
                                policy_clip(clip_low, clip_high, dual_clip),
                                with_gradient ? mutable_data<float>(gradient) : nullptr, sums.data()};
  parallel(rows.count, rows.length * 4,
           [&](int64_t begin, int64_t end) { kernels().ppo_policy(in, begin, end); });
  PolicySums all{};
  for (const auto& row : sums) {
    all.loss += row.loss;
    all.ratio += row.ratio;
    all.deviation = row.deviation > all.deviation || row.deviation != row.deviation ? row.deviation : all.deviation;
    all.kl += row.kl;
    all.clipped += row.clipped;
  }
  const double share = weights.positions ? 1.0 / static_cast<double>(weights.positions) : 0.0;
  Tensor statistics = without_pages({4}, ScalarType::Float);
  const double values[] = {all.ratio * share, all.deviation, all.kl * share, all.clipped * share};
  for (int i = 0; i < 4; ++i) mutable_data<float>(statistics)[i] = static_cast<float>(values[i]);
  return {scalar(all.loss), statistics, gradient};
}

std::tuple<Tensor, Tensor, Tensor> ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor wanted,
                                                  std::optional<double> clip_range, std::string reduction,
                                                  bool with_gradient) {
  const Mask mask("mask", wanted);
  const TokenRows rows(values, old_values, returns, reduction);
  const Weights weights(mask.data(), rows.count, rows.length, rows.positions, reduction);
  Tensor gradient = with_gradient ? empty(sizes(values), ScalarType::Float) : nothing();
  std::vector<ValueSums> sums(rows.count);
  const ValueArguments in{rows.view(values), rows.view(old_values), rows.view(returns), mask.data(),
                               rows.length, rows.positions, weights.rows.data(),
                               clip_range ? static_cast<float>(*clip_range) : -1.0f,
                               with_gradient ? mutable_data<float>(gradient) : nullptr, sums.data()};
  parallel(rows.count, rows.length, [&](int64_t begin, int64_t end) { kernels().ppo_value(in, begin, end); });
  ValueSums all{};
  for (const auto& row : sums) {
    all.loss += row.loss;
    all.value += row.value;
    all.target += row.target;
    all.clipped += row.clipped;
  }
  const double share = weights.positions ? 1.0 / static_cast<double>(weights.positions) : 0.0;
  Tensor statistics = without_pages({3}, ScalarType::Float);
  const double shares[] = {all.value * share, all.target * share, all.clipped * share};
  for (int i = 0; i < 3; ++i) mutable_data<float>(statistics)[i] = static_cast<float>(shares[i]);
  return {scalar(all.loss), statistics, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, library) {
  library.impl("ppo_policy_loss", TORCH_BOX(&ppo_policy_loss));
  library.impl("ppo_value_loss", TORCH_BOX(&ppo_value_loss));
}

}  // namespace rlhf_kernels::cpu::ops
