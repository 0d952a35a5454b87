// Log-probs from logits, for CUDA tensors.

#include <tuple>

#include "cuda/kernels.h"
#include "cuda/ops/launch.h"
#include "tensors.h"

namespace rlhf_kernels::cuda::ops {
namespace {

using namespace tensors;

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_log_softmax(Tensor logits, Tensor index, Tensor wanted,
                                                                 double temperature, bool with_entropy,
                                                                 bool /*inplace_backward: for autograd*/) {
  const Launch launch(logits);
  logits = with_dense_rows(logits);
  const Tensor dense_index = cast(index, ScalarType::Long), dense_wanted = dense(wanted);
  Tensor logprobs = launch.empty_like(index), maxima = launch.empty_like(index), log_sums = launch.empty_like(index),
         entropies = with_entropy ? launch.empty_like(index) : launch.nothing();
  const auto in = log_prob_arguments(logits, dense_index, data<uint8_t>(dense_wanted), temperature);
  const LogProbResults out{mutable_data<float>(logprobs), with_entropy ? mutable_data<float>(entropies) : nullptr,
                           mutable_data<float>(maxima), mutable_data<float>(log_sums)};
  const int64_t rows = index.numel(), chunks = cuda::vocabulary_chunks(in.vocabulary);
  const bool several = chunks > 1 && rows > 0;
  const Tensor sums = launch.bytes(several ? rows * chunks * static_cast<int64_t>(sizeof(OnlineSoftmax)) : 0);
  const Tensor tickets = several ? launch.zeros({rows}, ScalarType::Int) : launch.nothing();
  cuda::log_prob(in, out, rows, mutable_data<OnlineSoftmax>(sums), mutable_data<unsigned>(tickets), launch.stream);
  return {logprobs, entropies, maxima, log_sums};
}

void log_prob_backward(const Launch& launch, const Tensor& logits, const Tensor& index, const Tensor& wanted,
                       double temperature, const Tensor& entropies, const Tensor& maxima, const Tensor& log_sums,
                       const Tensor& grad_logprobs, const OptionalTensor& grad_entropies, const Tensor& gradient) {
  const Tensor dense_index = cast(index, ScalarType::Long), dense_wanted = dense(wanted);
  const Tensor slopes = cast(grad_logprobs, ScalarType::Float);
  const OptionalTensor entropy_slopes = as_float(grad_entropies);
  const LogProbGradient out{data<float>(entropies), data<float>(maxima), data<float>(log_sums),
                            data<float>(slopes), data<float>(entropy_slopes), gradient.mutable_data_ptr(),
                            rows_of(gradient)};
  cuda::log_prob_backward(log_prob_arguments(logits, dense_index, data<uint8_t>(dense_wanted), temperature), out,
                          index.numel(), launch.stream);
}

Tensor selective_log_softmax_backward(Tensor logits, Tensor index, Tensor wanted, double temperature, Tensor entropies,
                                      Tensor maxima, Tensor log_sums, Tensor grad_logprobs,
                                      OptionalTensor grad_entropies) {
  const Launch launch(logits);
  logits = with_dense_rows(logits);
  Tensor gradient = launch.empty(sizes(logits), logits.scalar_type());
  log_prob_backward(launch, logits, index, wanted, temperature, entropies, maxima, log_sums, grad_logprobs,
                    grad_entropies, gradient);
  return gradient;
}

void selective_log_softmax_backward_(Tensor logits, Tensor index, Tensor wanted, double temperature, Tensor entropies,
                                     Tensor maxima, Tensor log_sums, Tensor grad_logprobs,
                                     OptionalTensor grad_entropies) {
  if (!has_dense_rows(logits)) {
    const Tensor gradient = selective_log_softmax_backward(logits, index, wanted, temperature, entropies, maxima,
                                                           log_sums, grad_logprobs, grad_entropies);
    torch::stable::copy_(logits, gradient);
    return;
  }
  const Launch launch(logits);
  log_prob_backward(launch, logits, index, wanted, temperature, entropies, maxima, log_sums, grad_logprobs,
                    grad_entropies, logits);
}

}  // namespace

RLHF_CUDA_OPS(library) {
  library.impl("selective_log_softmax", TORCH_BOX(&selective_log_softmax));
  library.impl("selective_log_softmax_backward", TORCH_BOX(&selective_log_softmax_backward));
  library.impl("selective_log_softmax_backward_", TORCH_BOX(&selective_log_softmax_backward_));
}

}  // namespace rlhf_kernels::cuda::ops
