// Log-prob and entropy of a row in one read of its logits; their gradient in one read and one write.

#include <cmath>

#include "cpu/denormals.h"
#include "cpu/softmax.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

void log_prob(const LogProbArguments& in, const LogProbResults& out, int64_t begin, int64_t end) {
  const FlushDenormals flush;
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
      const float chosen = static_cast<float>(logits[in.index[row]]);
      out.logprobs[row] = static_cast<float>(rlhf_kernels::log_prob(sums, chosen, inverse_temperature));
      if (out.entropies) out.entropies[row] = static_cast<float>(entropy(sums));
      out.maxima[row] = sums.maximum;
      out.log_sums[row] = static_cast<float>(std::log(sums.sum));
    }
  });
}

void log_prob_backward(const LogProbArguments& in, const LogProbGradient& out, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const double inverse_temperature = 1.0 / in.temperature;
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
      const float grad_logprob = out.grad_logprobs[row];
      const float grad_entropy = out.grad_entropies ? out.grad_entropies[row] : 0.0f;
      // Read before it is written over, and added in float32: one rounding, as for every other token.
      const float chosen = index < 0 ? 0.0f : static_cast<float>(logits[index]);
      const float entropy = grad_entropy != 0 ? out.entropies[row] : 0.0f;
      const LogitGradient<Vec> slopes(out.maxima[row], out.log_sums[row], entropy, grad_logprob, grad_entropy,
                                      inverse_temperature);
      if (grad_entropy != 0) {
        gradient_row<true>(slopes, logits, in.vocabulary, gradient);
      } else {
        gradient_row<false>(slopes, logits, in.vocabulary, gradient);
      }
      if (index < 0) continue;  // in another part of the vocabulary
      gradient[index] = static_cast<T>(static_cast<float>(chosen_logit_gradient(
          chosen, out.maxima[row], out.log_sums[row], entropy, grad_logprob, grad_entropy, inverse_temperature)));
    }
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
