// Advantages from the last position of a sequence to its first, and their whitening.

#include "cpu/rows.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

// With shaping, rewards are made block by block just before they are used, and the values in between never leave the
// cache. The recursion runs in double: its cost is the latency of one chain either way, and long sequences lose nothing.
void gae(const GaeArguments& in, const KlShaping* shaping, int64_t begin, int64_t end) {
  Scratch scratch[3];
  const double gamma = in.gamma, gamma_lambda = in.gamma * in.lambda;
  for (int64_t b = begin; b < end; ++b) {
    const Span span = span_of(in.sequences, b);
    const int64_t last = shaping ? last_wanted(in.wanted + span.flat, span.length) : -1;
    GaeCarry carry{0, in.bootstrap ? static_cast<double>(in.bootstrap[b]) : 0};
    Moments moments;
    for (int64_t stop = span.length; stop > 0;) {
      const int64_t start = (stop - 1) / kRowBlock * kRowBlock, count = stop - start, flat = span.flat + start;
      const float* rewards;
      if (shaping) {
        shape_block(*shaping, span, in.wanted, start, count, start <= last && last < stop ? last - start : -1, b,
                    scratch);
        rewards = shaping->rewards + flat;
      } else {
        rewards = read(in.rewards, span.row, span.column + start, count, scratch[0]);
      }
      const float* values = read(in.values, span.row, span.column + start, count, scratch[2]);
      const uint8_t* wanted = in.wanted + flat;
      float* advantages = in.advantages + flat;
      float* returns = in.returns + flat;
      for (int64_t t = count - 1; t >= 0; --t) {
        const bool keep = wanted[t];
        carry = gae_step(carry, rewards[t], values[t], keep, gamma, gamma_lambda);
        advantages[t] = keep ? static_cast<float>(carry.advantage) : 0.0f;
        returns[t] = keep ? static_cast<float>(carry.advantage + values[t]) : 0.0f;
      }
      if (in.moments) {
        Moments block;
        double total = 0;
        int64_t n = 0;
        for (int64_t t = 0; t < count; ++t) {
          n += wanted[t] != 0;
          total += advantages[t];
        }
        if (n) {
          block.count = static_cast<double>(n);
          block.mean = total / block.count;
          for (int64_t t = 0; t < count; ++t) {
            const double distance = wanted[t] ? advantages[t] - block.mean : 0.0;
            block.squares += distance * distance;
          }
          merge(moments, block);
        }
      }
      stop = start;
    }
    if (in.moments) in.moments[b] = moments;
  }
}

void whiten(float* advantages, const uint8_t* wanted, double mean, double scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    advantages[i] = wanted[i] ? static_cast<float>((advantages[i] - mean) * scale) : 0.0f;
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
