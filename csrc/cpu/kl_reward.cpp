// Per-token KL penalties, and rewards shaped by them.

#include "cpu/kl_reward.h"

#include "cpu/rows.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

namespace {

// At every position of some rows: store(place in contiguous outputs, lanes, log-probs, those of the reference, and which
// positions count).
template <class Store>
void for_pairs(const View& logprobs, const View& ref, const uint8_t* wanted, int64_t length, int64_t begin, int64_t end,
               Store&& store) {
  Scratch scratch[2];
  const Lanes all = greater(Vec(1.0f), Vec(0.0f));
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t t = 0; t < length; t += kRowBlock) {
      const int64_t count = length - t < kRowBlock ? length - t : kRowBlock;
      const float* a = read(logprobs, row, t, count, scratch[0]);
      const float* b = read(ref, row, t, count, scratch[1]);
      for_lanes(count, [&](int64_t i, int64_t lanes) {
        const int64_t at = row * length + t + i;
        store(at, lanes, load_lanes(a + i, lanes), load_lanes(b + i, lanes), wanted ? lanes_of(wanted + at, lanes) : all);
      });
    }
  }
}

}  // namespace

void kl_penalty(const View& logprobs, const View& ref, const uint8_t* wanted, int64_t length, KlEstimator estimator,
                float* result, int64_t begin, int64_t end) {
  for_pairs(logprobs, ref, wanted, length, begin, end,
            [&](int64_t at, int64_t lanes, const Vec& a, const Vec& b, const Lanes& keep) {
              store_lanes(result + at, kept(keep, rlhf_kernels::kl_penalty(a, b, estimator)), lanes);
            });
}

void kl_penalty_backward(const View& logprobs, const View& ref, const uint8_t* wanted, int64_t length,
                         KlEstimator estimator, const float* grad, float* result, int64_t begin, int64_t end) {
  for_pairs(logprobs, ref, wanted, length, begin, end,
            [&](int64_t at, int64_t lanes, const Vec& a, const Vec& b, const Lanes& keep) {
              const Vec slope = kl_penalty_gradient(a, b, estimator);
              store_lanes(result + at, kept(keep, load_lanes(grad + at, lanes) * slope), lanes);
            });
}

void kl_shaped_rewards(const KlShaping& in, const Sequences& sequences, const uint8_t* wanted, int64_t begin,
                       int64_t end) {
  Scratch scratch[2];
  for (int64_t b = begin; b < end; ++b) {
    const Span span = span_of(sequences, b);
    const int64_t last = last_wanted(wanted + span.flat, span.length);
    for (int64_t t = 0; t < span.length; t += kRowBlock) {
      const int64_t count = span.length - t < kRowBlock ? span.length - t : kRowBlock;
      shape_block(in, span, wanted, t, count, t <= last && last < t + count ? last - t : -1, b, scratch);
    }
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
