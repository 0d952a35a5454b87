// Log-probs from logits, for CUDA tensors.

#include <tuple>

#include "cuda/kernels.h"
#include "cuda/ops/launch.h"
#include "cuda/ops/mask.h"
#include "tensors.h"

namespace rlhf_kernels::cuda::ops {
namespace {

using namespace tensors;

using Ignored = std::optional<int64_t>;

cuda::LogProbInputs inputs_of(const Tensor& logits, const Tensor& index, const OptionalTensor& mask, Ignored ignored,
                              double temperature) {
  return {logits_of(logits), integers_of(index), mask_of(mask), mask ? places_of(*mask) : Rows{}, ignored.has_value(),
          ignored.value_or(0), temperature};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_log_softmax(Tensor logits, Tensor index, OptionalTensor mask,
                                                                 Ignored ignore_index, double temperature,
                                                                 bool with_entropy,
                                                                 bool /*inplace_backward: for autograd*/) {
  const Launch launch(logits);
  logits = with_dense_rows(logits);
  Tensor logprobs = launch.empty_like(index), maxima = launch.empty_like(index), log_sums = launch.empty_like(index),
         entropies = with_entropy ? launch.empty_like(index) : launch.nothing();
  const LogProbResults out{mutable_data<float>(logprobs), with_entropy ? mutable_data<float>(entropies) : nullptr,
                           mutable_data<float>(maxima), mutable_data<float>(log_sums)};
  cuda::log_prob(inputs_of(logits, index, mask, ignore_index, temperature), out, index.numel(), launch.stream);
  return {logprobs, entropies, maxima, log_sums};
}

void log_prob_backward(const Launch& launch, const Tensor& logits, const Tensor& index, const OptionalTensor& mask,
                       Ignored ignore_index, double temperature, const Tensor& entropies, const Tensor& maxima,
                       const Tensor& log_sums, const Tensor& grad_logprobs, const OptionalTensor& grad_entropies,
                       const Tensor& gradient) {
  const Tensor slopes = cast(grad_logprobs, ScalarType::Float);
  const OptionalTensor entropy_slopes = as_float(grad_entropies);
  const LogProbGradient out{data<float>(entropies), data<float>(maxima), data<float>(log_sums),
                            data<float>(slopes), data<float>(entropy_slopes), gradient.mutable_data_ptr(),
                            rows_of(gradient)};
  cuda::log_prob_backward(inputs_of(logits, index, mask, ignore_index, temperature), out, index.numel(), launch.stream);
}

Tensor selective_log_softmax_backward(Tensor logits, Tensor index, OptionalTensor mask, Ignored ignore_index,
                                      double temperature, Tensor entropies, Tensor maxima, Tensor log_sums,
                                      Tensor grad_logprobs, OptionalTensor grad_entropies) {
  const Launch launch(logits);
  logits = with_dense_rows(logits);
  Tensor gradient = launch.empty(sizes(logits), logits.scalar_type());
  log_prob_backward(launch, logits, index, mask, ignore_index, temperature, entropies, maxima, log_sums, grad_logprobs,
                    grad_entropies, gradient);
  return gradient;
}

void selective_log_softmax_backward_(Tensor logits, Tensor index, OptionalTensor mask, Ignored ignore_index,
                                     double temperature, Tensor entropies, Tensor maxima, Tensor log_sums,
                                     Tensor grad_logprobs, OptionalTensor grad_entropies) {
  if (!has_dense_rows(logits)) {
    const Tensor gradient = selective_log_softmax_backward(logits, index, mask, ignore_index, temperature, entropies,
                                                           maxima, log_sums, grad_logprobs, grad_entropies);
    torch::stable::copy_(logits, gradient);
    return;
  }
  const Launch launch(logits);
  log_prob_backward(launch, logits, index, mask, ignore_index, temperature, entropies, maxima, log_sums, grad_logprobs,
                    grad_entropies, logits);
}

}  // namespace

RLHF_CUDA_OPS(library) {
  library.impl("selective_log_softmax", TORCH_BOX(&selective_log_softmax));
  library.impl("selective_log_softmax_backward", TORCH_BOX(&selective_log_softmax_backward));
  library.impl("selective_log_softmax_backward_", TORCH_BOX(&selective_log_softmax_backward_));
}

}  // namespace rlhf_kernels::cuda::ops
