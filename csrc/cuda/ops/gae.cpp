// Advantages and returns, for CUDA tensors.

#include <string>
#include <tuple>

#include "cuda/kernels.h"
#include "cuda/ops/launch.h"
#include "cuda/ops/mask.h"
#include "tensors.h"

namespace rlhf_kernels::cuda::ops {
namespace {

using namespace tensors;

using Whitening = std::optional<std::string>;  // none, "population" or "unbiased"

std::tuple<Tensor, Tensor> advantages_of(const Launch& launch, const Tensor& like, const OptionalTensor& wanted,
                                         GaeArguments in, const KlShaping* shaping, const Whitening& whiten) {
  const OptionalTensor mask = dense(wanted);
  Tensor advantages = launch.empty_like(like), returns = launch.empty_like(like);
  const Tensor moments = launch.bytes(whiten ? in.sequences.count * static_cast<int64_t>(sizeof(Moments)) : 0);
  in.advantages = mutable_data<float>(advantages);
  in.returns = mutable_data<float>(returns);
  in.moments = whiten ? mutable_data<Moments>(moments) : nullptr;
  in.unbiased = whiten == "unbiased";
  if (shaping) {
    cuda::ppo_advantages(in, mask_of(mask), *shaping, like.numel(), launch.stream);
  } else {
    cuda::gae(in, mask_of(mask), like.numel(), launch.stream);
  }
  return {advantages, returns};
}

std::tuple<Tensor, Tensor> masked_gae(Tensor rewards, Tensor values, OptionalTensor mask, double gamma, double lam,
                                      OptionalTensor bootstrap, Whitening whiten, OptionalTensor cu_seqlens) {
  const Launch launch(rewards);
  const OptionalTensor last = as_float(bootstrap), boundaries = as_int64(cu_seqlens);
  return advantages_of(launch, rewards, mask,
                       {view_of(rewards), view_of(values), nullptr, sequences_of(rewards, boundaries), gamma,
                        lam, data<float>(last), nullptr, nullptr, nullptr, false},
                       nullptr, whiten);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs,
                                                          Tensor values, OptionalTensor mask, double beta, double gamma,
                                                          double lam, Whitening whiten, OptionalTensor bootstrap,
                                                          std::string estimator, std::optional<double> score_clip,
                                                          OptionalTensor cu_seqlens) {
  const Launch launch(logprobs);
  const Tensor row_scores = cast(scores, ScalarType::Float);
  const OptionalTensor last = as_float(bootstrap), boundaries = as_int64(cu_seqlens);
  Tensor rewards = launch.empty_like(logprobs), kl = launch.empty_like(logprobs);
  const auto shaping = shaping_of(row_scores, logprobs, ref_logprobs, beta, estimator, score_clip, rewards, kl);
  const auto [advantages, returns] = advantages_of(
      launch, logprobs, mask,
      {{}, view_of(values), nullptr, sequences_of(logprobs, boundaries), gamma, lam, data<float>(last),
       nullptr, nullptr, nullptr, false},
      &shaping, whiten);
  return {advantages, returns, rewards, kl};
}

}  // namespace

RLHF_CUDA_OPS(library) {
  library.impl("masked_gae", TORCH_BOX(&masked_gae));
  library.impl("ppo_advantages", TORCH_BOX(&ppo_advantages));
}

}  // namespace rlhf_kernels::cuda::ops
