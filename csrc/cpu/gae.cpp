// Advantages from the last position of a sequence to its first, and their whitening.

#include "cpu/rows.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

int64_t count_wanted(const uint8_t* wanted, int64_t length) {
  int64_t total = 0;
  // Bytes are added as bytes, which a vector does 64 at a time, in runs too short to overflow.
  for (int64_t start = 0; start < length; start += 128) {
    const int64_t stop = start + 128 < length ? start + 128 : length;
    uint8_t some = 0;
    for (int64_t i = start; i < stop; ++i) some = static_cast<uint8_t>(some + (wanted[i] != 0));
    total += some;
  }
  return total;
}

namespace {

// Of one block, in two passes over what the cache holds; masked entries are 0 already.
Moments moments_of(const float* values, const uint8_t* wanted, int64_t count) {
  Moments result;
  result.count = static_cast<double>(count_wanted(wanted, count));
  if (result.count == 0) return result;
  Vec total(0.0f), squares(0.0f);
  for_lanes(count, [&](int64_t i, int64_t lanes) { total = total + load_lanes(values + i, lanes); });
  // Rounded, so that the distances below are to the very mean that is kept.
  const float mean = static_cast<float>(sum(total) / result.count);
  for_lanes(count, [&](int64_t i, int64_t lanes) {
    const Vec distance = (load_lanes(values + i, lanes) - Vec(mean)) & lanes_of(wanted + i, lanes);
    squares = fma(distance, distance, squares);
  });
  // The sums are off their true mean by the rounding above, which the next line takes back out.
  const double offset = sum(total) / result.count - mean;
  result.mean = mean + offset;
  result.squares = sum(squares) - offset * offset * result.count;
  return result;
}

}  // namespace

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
        merge(moments, moments_of(advantages, wanted, count));
      }
      stop = start;
    }
    if (in.moments) in.moments[b] = moments;
  }
}

void whiten(float* advantages, const uint8_t* wanted, double mean, double scale, int64_t begin, int64_t end) {
  // The mean in two parts: advantages far from 0 against their spread would lose digits to its rounding.
  const float high = static_cast<float>(mean), low = static_cast<float>(mean - high);
  for_lanes(end - begin, [&](int64_t i, int64_t lanes) {
    float* at = advantages + begin + i;
    const Vec centred = (load_lanes(at, lanes) - Vec(high)) - Vec(low);
    store_lanes(at, (centred * Vec(static_cast<float>(scale))) & lanes_of(wanted + begin + i, lanes), lanes);
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
