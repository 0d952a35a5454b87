// The pairwise ranking loss, for CUDA tensors.

#include <tuple>

#include "cuda/kernels.h"
#include "cuda/ops/launch.h"
#include "cuda/ops/mask.h"
#include "tensors.h"

namespace rlhf_kernels::cuda::ops {
namespace {

using namespace tensors;

std::tuple<Tensor, Tensor, Tensor> pairwise_ranking_loss(Tensor scores, Tensor ranks, OptionalTensor offsets,
                                                         OptionalTensor wanted, double margin, bool with_gradient) {
  const Launch launch(scores);
  Tensor gradient = with_gradient ? launch.empty_like(scores) : launch.nothing();
  const OptionalTensor boundaries = as_int64(offsets);
  const auto prompts = sequences_of(scores, boundaries);
  if (scores.numel() == 0) return {launch.zeros({}), launch.zeros({}), gradient};
  const Tensor values = dense(scores), dense_ranks = cast(ranks, ScalarType::Long);
  const OptionalTensor mask = dense(wanted);
  Tensor loss = launch.empty({}), accuracy = launch.empty({});
  const Tensor workspace = launch.bytes(cuda::ranking_workspace(prompts.count));
  cuda::ranking_loss({values.const_data_ptr(), dtype_of(values), data<int64_t>(dense_ranks),
                      mask_of(mask), prompts,
                      scores.numel(), static_cast<float>(margin), with_gradient ? mutable_data<float>(gradient) : nullptr,
                      mutable_data<float>(loss), mutable_data<float>(accuracy)},
                     workspace.mutable_data_ptr(), launch.stream);
  return {loss, accuracy, gradient};
}

}  // namespace

RLHF_CUDA_OPS(library) {
  library.impl("pairwise_ranking_loss", TORCH_BOX(&pairwise_ranking_loss));
}

}  // namespace rlhf_kernels::cuda::ops
