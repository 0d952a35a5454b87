// PPO's losses, for CUDA tensors.

#include <string>
#include <tuple>

#include "cuda/kernels.h"
#include "cuda/ops/launch.h"
#include "cuda/ops/mask.h"
#include "cuda/ops/rows.h"
#include "tensors.h"

namespace rlhf_kernels::cuda::ops {
namespace {

using namespace tensors;

cuda::Reduction reduction_of(const std::string& name) {
  if (name == "token-mean") return cuda::Reduction::token_mean;
  return name == "seq-mean-token-mean" ? cuda::Reduction::seq_mean_token_mean : cuda::Reduction::seq_mean_token_sum;
}

// What both losses have in common. run(arguments, workspace) launches the kernels.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> token_loss(const Launch& launch, const Tensor& first, const Tensor& second,
                                              const Tensor& third, const OptionalTensor& fourth, const OptionalTensor& wanted,
                                              bool by_sequence, const std::string& reduction,
                                              std::optional<double> denominator, bool with_gradient,
                                              int64_t statistics, Run&& run) {
  Tensor gradient = with_gradient ? launch.empty_like(first) : launch.nothing();
  if (first.numel() == 0) return {launch.zeros({}), launch.zeros({statistics}), gradient};
  const OptionalTensor mask = dense(wanted);
  Tensor loss = launch.empty({}), values = launch.empty({statistics});
  cuda::TokenLoss in{{view_of(first), view_of(second), view_of(third), fourth ? view_of(*fourth) : View{}},
                     mask_of(mask), TokenRows(first).count,
                     TokenRows(first).length, reduction_of(reduction), denominator.value_or(0.0),
                     with_gradient ? mutable_data<float>(gradient) : nullptr, mutable_data<float>(loss),
                     mutable_data<float>(values)};
  // With token-mean the rows do not matter: contiguous inputs are read as one row, so that short rows share a block.
  if (in.reduction == cuda::Reduction::token_mean && !by_sequence && first.is_contiguous() && second.is_contiguous() &&
      third.is_contiguous() && (!fourth || fourth->is_contiguous())) {
    in.length = first.numel();
    in.rows = 1;
    for (auto& view : in.inputs) view.stride = 1;
  }
  const Tensor workspace = launch.bytes(cuda::token_loss_workspace(in.rows, in.length));
  run(in, workspace.mutable_data_ptr());
  return {loss, values, gradient};
}

std::tuple<Tensor, Tensor, Tensor> ppo_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                                                   OptionalTensor wanted, OptionalTensor ref_logprobs, double beta,
                                                   double clip_low, double clip_high, std::optional<double> dual_clip,
                                                   std::optional<double> log_ratio_clamp, bool cispo, bool by_sequence,
                                                   std::string reduction, std::optional<double> denominator,
                                                   bool with_gradient) {
  const Launch launch(logprobs);
  const auto options = PolicyOptions::of(clip_low, clip_high, dual_clip, log_ratio_clamp, cispo, by_sequence, beta);
  return token_loss(launch, logprobs, old_logprobs, advantages, ref_logprobs, wanted, by_sequence, reduction, denominator,
                    with_gradient, PolicyStatistics<double>::kCount, [&](const cuda::TokenLoss& in, void* workspace) {
                      cuda::ppo_policy_loss(in, options, workspace, launch.stream);
                    });
}

std::tuple<Tensor, Tensor, Tensor> ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, OptionalTensor wanted,
                                                  std::optional<double> clip_range, std::string reduction,
                                                  std::optional<double> denominator, bool with_gradient) {
  const Launch launch(values);
  return token_loss(launch, values, old_values, returns, std::nullopt, wanted, false, reduction, denominator,
                    with_gradient, ValueStatistics<double>::kCount, [&](const cuda::TokenLoss& in, void* workspace) {
                      cuda::ppo_value_loss(in, static_cast<float>(clip_range.value_or(-1.0)), workspace, launch.stream);
                    });
}

}  // namespace

RLHF_CUDA_OPS(library) {
  library.impl("ppo_policy_loss", TORCH_BOX(&ppo_policy_loss));
  library.impl("ppo_value_loss", TORCH_BOX(&ppo_value_loss));
}

}  // namespace rlhf_kernels::cuda::ops
