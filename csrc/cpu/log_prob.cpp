// Log-prob and entropy of a row in one read of its logits; their gradient in one read and one write.

#include <cmath>

#include "cpu/softmax.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {
namespace {

template <class T>
void backward_row(const T* logits, T* gradient, int64_t vocabulary, float maximum, float log_sum, float grad_logprob,
                  float grad_entropy, float entropy, float inverse_temperature) {
  const Vec top(maximum), scale(inverse_temperature), sums(log_sum), floor(kSmallestExponent);
  const Vec go(grad_logprob), gh(grad_entropy), h(entropy);
  for (int64_t i = 0; i < vocabulary; i += kLanes) {
    const int64_t count = vocabulary - i < kLanes ? vocabulary - i : kLanes;
    const Vec log_p = larger(floor, (load_lanes(logits + i, count) - top) * scale - sums);
    store_lanes(gradient + i, logit_gradient(log_p, go, gh, h, scale), count);
  }
}

}  // namespace

void log_prob(const LogProbArguments& in, const LogProbResults& out, int64_t begin, int64_t end) {
  const double inverse_temperature = 1.0 / in.temperature;
  for_dtype(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      out.logprobs[row] = out.maxima[row] = out.log_sums[row] = 0;
      if (out.entropies) out.entropies[row] = 0;
      if (!in.wanted[row]) continue;
      const T* logits = static_cast<const T*>(in.logits) + in.rows.offset(row);
      const OnlineSoftmax sums = out.entropies ? reduce_row<T, true>(logits, in.vocabulary, inverse_temperature)
                                               : reduce_row<T, false>(logits, in.vocabulary, inverse_temperature);
      const int64_t index = in.index[row];
      const bool valid = index >= 0 && index < in.vocabulary;
      out.logprobs[row] = valid ? static_cast<float>(rlhf_kernels::log_prob(
                                      sums, static_cast<float>(logits[index]), inverse_temperature))
                                : NAN;
      if (out.entropies) out.entropies[row] = static_cast<float>(entropy(sums));
      out.maxima[row] = sums.maximum;
      out.log_sums[row] = static_cast<float>(std::log(sums.sum));
    }
  });
}

void log_prob_backward(const LogProbArguments& in, const LogProbGradient& out, int64_t begin, int64_t end) {
  const float inverse_temperature = static_cast<float>(1.0 / in.temperature);
  for_dtype(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      T* gradient = static_cast<T*>(out.gradient) + out.rows.offset(row);
      if (!in.wanted[row]) {
        for (int64_t i = 0; i < in.vocabulary; ++i) gradient[i] = T(0.0f);
        continue;
      }
      const T* logits = static_cast<const T*>(in.logits) + in.rows.offset(row);
      const int64_t index = in.index[row];
      const bool valid = index >= 0 && index < in.vocabulary;
      const float grad_logprob = valid ? out.grad_logprobs[row] : 0.0f;
      const float grad_entropy = out.grad_entropies ? out.grad_entropies[row] : 0.0f;
      // Read before it is written over, and added in float32: one rounding, as for every other token.
      const float chosen = valid ? static_cast<float>(logits[index]) : 0.0f;
      backward_row(logits, gradient, in.vocabulary, out.maxima[row], out.log_sums[row], grad_logprob, grad_entropy,
                   grad_entropy != 0 ? out.entropies[row] : 0.0f, inverse_temperature);
      if (!valid) continue;
      const double log_p = (static_cast<double>(chosen) - out.maxima[row]) / in.temperature - out.log_sums[row];
      const double p = std::exp(log_p);
      const double from_entropy = grad_entropy == 0 || p == 0 ? 0.0 : p * grad_entropy * (log_p + out.entropies[row]);
      gradient[index] = static_cast<T>(static_cast<float>((grad_logprob * (1 - p) - from_entropy) / in.temperature));
    }
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
