// The KL penalty and the rewards that it shapes, for CUDA tensors.

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

Tensor kl_penalty(Tensor logprobs, Tensor ref_logprobs, OptionalTensor wanted, std::string estimator) {
  const Launch launch(logprobs);
  const OptionalTensor mask = dense(wanted);
  Tensor result = launch.empty_like(logprobs);
  const TokenRows rows(logprobs);
  cuda::kl_penalty(view_of(logprobs), view_of(ref_logprobs), mask_of(mask), rows.count,
                   rows.length, estimator_of(estimator), mutable_data<float>(result), launch.stream);
  return result;
}

Tensor kl_penalty_backward(Tensor logprobs, Tensor ref_logprobs, OptionalTensor wanted, std::string estimator,
                           Tensor gradient) {
  const Launch launch(logprobs);
  const OptionalTensor mask = dense(wanted);
  const Tensor slopes = cast(gradient, ScalarType::Float);
  Tensor result = launch.empty_like(logprobs);
  const TokenRows rows(logprobs);
  cuda::kl_penalty_backward(view_of(logprobs), view_of(ref_logprobs), mask_of(mask), rows.count,
                            rows.length, estimator_of(estimator), data<float>(slopes), mutable_data<float>(result),
                            launch.stream);
  return result;
}

std::tuple<Tensor, Tensor> kl_shaped_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, OptionalTensor wanted,
                                             double beta, std::string estimator, std::optional<double> score_clip) {
  const Launch launch(logprobs);
  const OptionalTensor mask = dense(wanted);
  const Tensor row_scores = cast(scores, ScalarType::Float);
  Tensor rewards = launch.empty_like(logprobs), kl = launch.empty_like(logprobs);
  cuda::kl_shaped_rewards(shaping_of(row_scores, logprobs, ref_logprobs, beta, estimator, score_clip, rewards, kl),
                          sequences_of(logprobs, std::nullopt), mask_of(mask), launch.stream);
  return {rewards, kl};
}

}  // namespace

RLHF_CUDA_OPS(library) {
  library.impl("kl_penalty", TORCH_BOX(&kl_penalty));
  library.impl("kl_penalty_backward", TORCH_BOX(&kl_penalty_backward));
  library.impl("kl_shaped_rewards", TORCH_BOX(&kl_shaped_rewards));
}

}  // namespace rlhf_kernels::cuda::ops
