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

// The loss and the statistics of all rows, in one order.
template <class Sums>
std::tuple<Tensor, Tensor> added_up(const std::vector<Sums>& rows, const Weights& weights) {
  Sums all;
  for (const auto& row : rows) {
    all.loss += row.loss;
    all.statistics.add(row.statistics);
  }
  Tensor statistics = without_pages({all.statistics.kCount}, ScalarType::Float);
  all.statistics.store(mutable_data<float>(statistics),
                       weights.positions ? 1.0 / static_cast<double>(weights.positions) : 0.0);
  return {scalar(all.loss), statistics};
}

std::tuple<Tensor, Tensor, Tensor> ppo_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                                                   OptionalTensor mask, OptionalTensor ref_logprobs, double beta,
                                                   double clip_low, double clip_high, std::optional<double> dual_clip,
                                                   std::optional<double> log_ratio_clamp, bool cispo, bool by_sequence,
                                                   std::string reduction, std::optional<double> denominator,
                                                   bool with_gradient) {
  const Mask wanted("mask", mask, logprobs);
  const bool dense = (!ref_logprobs || ref_logprobs->is_contiguous()) && !by_sequence;
  const auto rows = dense ? TokenRows(logprobs, old_logprobs, advantages, reduction) : TokenRows(logprobs);
  const Weights weights(wanted, rows.count, rows.length, rows.positions, reduction, denominator);
  Tensor gradient = with_gradient ? empty(sizes(logprobs), ScalarType::Float) : nothing();
  std::vector<PolicySums> sums(rows.count);
  const PolicyArguments in{rows.view(logprobs), rows.view(old_logprobs), rows.view(advantages),
                           ref_logprobs ? rows.view(*ref_logprobs) : View{},
                           wanted.data(), rows.length, rows.positions, weights.rows.data(),
                           PolicyOptions::of(clip_low, clip_high, dual_clip, log_ratio_clamp, cispo, by_sequence, beta),
                           with_gradient ? mutable_data<float>(gradient) : nullptr, sums.data()};
  parallel(rows.count, rows.length * (ref_logprobs ? 8 : 4),
           [&](int64_t begin, int64_t end) { kernels().ppo_policy(in, begin, end); });
  const auto [loss, statistics] = added_up(sums, weights);
  return {loss, statistics, gradient};
}

std::tuple<Tensor, Tensor, Tensor> ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, OptionalTensor mask,
                                                  std::optional<double> clip_range, std::string reduction,
                                                  std::optional<double> denominator, bool with_gradient) {
  const Mask wanted("mask", mask, values);
  const TokenRows rows(values, old_values, returns, reduction);
  const Weights weights(wanted, rows.count, rows.length, rows.positions, reduction, denominator);
  Tensor gradient = with_gradient ? empty(sizes(values), ScalarType::Float) : nothing();
  std::vector<ValueSums> sums(rows.count);
  const ValueArguments in{rows.view(values), rows.view(old_values), rows.view(returns), wanted.data(),
                          rows.length, rows.positions, weights.rows.data(),
                          clip_range ? static_cast<float>(*clip_range) : -1.0f,
                          with_gradient ? mutable_data<float>(gradient) : nullptr, sums.data()};
  parallel(rows.count, rows.length, [&](int64_t begin, int64_t end) { kernels().ppo_value(in, begin, end); });
  const auto [loss, statistics] = added_up(sums, weights);
  return {loss, statistics, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, library) {
  library.impl("ppo_policy_loss", TORCH_BOX(&ppo_policy_loss));
  library.impl("ppo_value_loss", TORCH_BOX(&ppo_value_loss));
}

}  // namespace rlhf_kernels::cpu::ops
