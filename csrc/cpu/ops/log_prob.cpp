// Log-probs from logits, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/ops/mask.h"
#include "cpu/ops/memory.h"
#include "tensors.h"

namespace rlhf_kernels::cpu::ops {
namespace {

using namespace tensors;

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_log_softmax(Tensor logits, Tensor index, OptionalTensor mask,
                                                                 std::optional<int64_t> ignore_index,
                                                                 double temperature, bool with_entropy,
                                                                 bool /*inplace_backward: for autograd*/) {
  logits = with_dense_rows(logits);
  const Tensor dense_index = cast(index, ScalarType::Long);
  Mask wanted("mask", mask, index);
  const auto in = log_prob_arguments(logits, dense_index, wanted.read_and_check(dense_index, ignore_index).data(), temperature);
  checks::check_index("index", dense_index, wanted.data(), in.vocabulary);
  const auto shape = sizes(index);
  Tensor logprobs = empty(shape, ScalarType::Float), maxima = empty(shape, ScalarType::Float),
         log_sums = empty(shape, ScalarType::Float), entropies = with_entropy ? empty(shape, ScalarType::Float) : nothing();
  const LogProbResults out{mutable_data<float>(logprobs), with_entropy ? mutable_data<float>(entropies) : nullptr,
                           mutable_data<float>(maxima), mutable_data<float>(log_sums)};
  parallel(index.numel(), in.vocabulary,
           [&](int64_t begin, int64_t end) { kernels().log_prob(in, out, begin, end); });
  return {logprobs, entropies, maxima, log_sums};
}

void log_prob_backward(const Tensor& logits, const Tensor& index, const OptionalTensor& mask,
                       std::optional<int64_t> ignore_index, double temperature, const Tensor& entropies,
                       const Tensor& maxima, const Tensor& log_sums, const Tensor& grad_logprobs,
                       const OptionalTensor& grad_entropies, const Tensor& gradient) {
  const Tensor dense_index = cast(index, ScalarType::Long);
  Mask wanted("mask", mask, index);
  const auto in = log_prob_arguments(logits, dense_index, wanted.read_and_check(dense_index, ignore_index).data(), temperature);
  checks::check_index("index", dense_index, wanted.data(), in.vocabulary, -1);
  const Tensor slopes = cast(grad_logprobs, ScalarType::Float);
  const OptionalTensor entropy_slopes = as_float(grad_entropies);
  const LogProbGradient out{data<float>(entropies), data<float>(maxima), data<float>(log_sums),
                            data<float>(slopes), data<float>(entropy_slopes), gradient.mutable_data_ptr(),
                            rows_of(gradient)};
  const bool in_place = gradient.const_data_ptr() == logits.const_data_ptr();
  const int64_t row_bytes = in.vocabulary * static_cast<int64_t>(gradient.element_size());
  parallel(index.numel(), in.vocabulary, [&](int64_t begin, int64_t end) {
    if (in_place) return kernels().log_prob_backward(in, out, begin, end);
    for (int64_t row = begin; row < end; ++row) {
      ensure_pages(mutable_data<char>(gradient) + row * row_bytes, row_bytes);
      kernels().log_prob_backward(in, out, row, row + 1);
    }
  });
}

Tensor selective_log_softmax_backward(Tensor logits, Tensor index, OptionalTensor mask,
                                      std::optional<int64_t> ignore_index, double temperature, Tensor entropies,
                                      Tensor maxima, Tensor log_sums, Tensor grad_logprobs,
                                      OptionalTensor grad_entropies) {
  logits = with_dense_rows(logits);
  Tensor gradient = without_pages(sizes(logits), logits.scalar_type());
  log_prob_backward(logits, index, mask, ignore_index, temperature, entropies, maxima, log_sums, grad_logprobs,
                    grad_entropies, gradient);
  return gradient;
}

void selective_log_softmax_backward_(Tensor logits, Tensor index, OptionalTensor mask,
                                     std::optional<int64_t> ignore_index, double temperature, Tensor entropies,
                                     Tensor maxima, Tensor log_sums, Tensor grad_logprobs,
                                     OptionalTensor grad_entropies) {
  if (!has_dense_rows(logits)) {
    const Tensor gradient = selective_log_softmax_backward(logits, index, mask, ignore_index, temperature, entropies,
                                                           maxima, log_sums, grad_logprobs, grad_entropies);
    torch::stable::copy_(logits, gradient);
    return;
  }
  log_prob_backward(logits, index, mask, ignore_index, temperature, entropies, maxima, log_sums, grad_logprobs,
                    grad_entropies, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, library) {
  library.impl("selective_log_softmax", TORCH_BOX(&selective_log_softmax));
  library.impl("selective_log_softmax_backward", TORCH_BOX(&selective_log_softmax_backward));
  library.impl("selective_log_softmax_backward_", TORCH_BOX(&selective_log_softmax_backward_));
}

}  // namespace rlhf_kernels::cpu::ops
