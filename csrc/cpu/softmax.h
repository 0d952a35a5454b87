// The running sums of one row of logits, read once.
#pragma once

#include "cpu/vec.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

// Read twice, the second time from the L1 cache: once for the maximum, once for the sums.
constexpr int64_t kBlock = 2048;

template <class T>
float block_maximum(const T* logits, int64_t count) {
  Vec best[4] = {Vec(-INFINITY), Vec(-INFINITY), Vec(-INFINITY), Vec(-INFINITY)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) best[j] = larger(load_lanes(logits + i + j * kLanes), best[j]);
  }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    best[0] = larger(load_lanes_or(logits + i, left, -INFINITY), best[0]);
  }
  return largest(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

// Sums over a block relative to a maximum, in powers of 2. Four chains of additions hide their latency and keep each one short, so
// that float32 loses nothing a double would have kept.
template <class T, bool kEntropy>
void block_sums(const T* logits, int64_t count, float maximum, double inverse_temperature, double& sum_e,
                double& sum_ed) {
  constexpr double log2_e = 1.44269504088896341;
  constexpr float smallest = -150.0f;  // 2^−150 rounds to 0 in float32
  const Vec top(maximum), scale(static_cast<float>(inverse_temperature * log2_e)), floor(smallest);
  Vec e_sums[4], ed_sums[4];
  const auto add = [&](const Vec& logit, int chain) __attribute__((always_inline)) {
    const Vec d = larger(floor, (logit - top) * scale);
    const Vec e = exp2_nonpositive(d);
    e_sums[chain] = e_sums[chain] + e;
    if constexpr (kEntropy) ed_sums[chain] = fma(e, d, ed_sums[chain]);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    // The next block travels from memory while this one is computed on; past the end a prefetch does nothing.
    for (int64_t ahead = 0; ahead < 4 * kLanes; ahead += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(logits + i + kBlock + ahead);
    }
    add(load_lanes(logits + i), 0);
    add(load_lanes(logits + i + kLanes), 1);
    add(load_lanes(logits + i + 2 * kLanes), 2);
    add(load_lanes(logits + i + 3 * kLanes), 3);
  }
  for (; i < count; i += kLanes) add(load_lanes_or(logits + i, count - i < kLanes ? count - i : kLanes, -INFINITY), 0);
  sum_e += sum((e_sums[0] + e_sums[1]) + (e_sums[2] + e_sums[3]));
  if constexpr (kEntropy) {
    sum_ed += sum((ed_sums[0] + ed_sums[1]) + (ed_sums[2] + ed_sums[3])) * 0.69314718055994531;  // back to nats
  }
}

template <class T, bool kEntropy>
OnlineSoftmax reduce_row(const T* logits, int64_t vocabulary, double inverse_temperature) {
  OnlineSoftmax row;
  for (int64_t i = 0; i < vocabulary; i += kBlock) {
    const int64_t count = vocabulary - i < kBlock ? vocabulary - i : kBlock;
    const float maximum = block_maximum(logits + i, count);
    if (maximum > row.maximum) {
      if (row.sum != 0) {
        const double shift = (static_cast<double>(row.maximum) - maximum) * inverse_temperature;
        const double scale = std::exp(shift);
        row.weighted = scale == 0 ? 0 : (row.weighted + shift * row.sum) * scale;
        row.sum *= scale;
      }
      row.maximum = maximum;
    }
    // Nothing but −inf so far: these tokens have probability 0, unless all of them are banned.
    if (row.maximum == -INFINITY && i + count < vocabulary) continue;
    block_sums<T, kEntropy>(logits + i, count, row.maximum, inverse_temperature, row.sum, row.weighted);
  }
  return row;
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
