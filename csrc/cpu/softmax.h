// The running sums of one row of logits, read once, and the gradient over it.
#pragma once

#include "cpu/vec.h"
#include "rlhf_kernels/online_softmax.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

// Logits in a block. A block is read once, and a second time, from the L1 cache, if it raises the row's maximum. Longer
// blocks would make that second read longer, shorter ones would repeat the work per block more often.
constexpr int64_t kBlock = 1024;

// Four vectors of what lies a page ahead, into the L2 cache: the arithmetic is too slow for the processor to see a stream
// that it should fetch early, and prefetches into L1 would wait for one of its few line buffers. Past the end of memory
// a prefetch does nothing.
template <class T>
inline void fetch_ahead(const T* at) {
  constexpr int64_t distance = 4096, line = 64;
  const char* start = reinterpret_cast<const char*>(at) + distance;
  for (int64_t i = 0; i < 4 * kLanes * static_cast<int64_t>(sizeof(T)); i += line) __builtin_prefetch(start + i, 0, 2);
}

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

// Per lane Σ 2^d and Σ 2^d·d over a block, with d = (logit − maximum)·scale, and the block's own maximum. They are summed in
// four chains, so that additions do not wait for each other, and each is short enough for float32.
struct BlockSums {
  Vec e, ed, maximum;
};

template <class T, bool kEntropy>
BlockSums block_sums(const T* logits, int64_t count, float maximum, double inverse_temperature) {
  const Vec top(maximum), scale(static_cast<float>(inverse_temperature * kLog2E)), floor(kVanishing);
  Vec e_sums[4], ed_sums[4];
  Vec best[4] = {Vec(-INFINITY), Vec(-INFINITY), Vec(-INFINITY), Vec(-INFINITY)};
  const auto add = [&](const Vec& logit, int chain) __attribute__((always_inline)) {
    best[chain] = larger(logit, best[chain]);
    const Vec d = larger(floor, (logit - top) * scale);
    const Vec e = power_of_two(d);
    e_sums[chain] = e_sums[chain] + e;
    if constexpr (kEntropy) ed_sums[chain] = fma(e, d, ed_sums[chain]);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    fetch_ahead(logits + i);
    add(load_lanes(logits + i), 0);
    add(load_lanes(logits + i + kLanes), 1);
    add(load_lanes(logits + i + 2 * kLanes), 2);
    add(load_lanes(logits + i + 3 * kLanes), 3);
  }
  for (; i < count; i += kLanes) add(load_lanes_or(logits + i, count - i < kLanes ? count - i : kLanes, -INFINITY), 0);
  BlockSums block;
  block.maximum = larger(larger(best[0], best[1]), larger(best[2], best[3]));
  block.e = (e_sums[0] + e_sums[1]) + (e_sums[2] + e_sums[3]);
  if constexpr (kEntropy) block.ed = (ed_sums[0] + ed_sums[1]) + (ed_sums[2] + ed_sums[3]);
  return block;
}

template <class T>
bool any_nan(const T* logits, int64_t count) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(logits[i]);
    any |= x != x;
  }
  return any;
}

struct NoVisitor {
  void operator()(int64_t, float, const BlockSums&) const {}
};

// visit(start, maximum, sums) is called with every block that has a logit above −inf, in order: its sums are relative to
// `maximum`, the largest logit so far.
template <class T, bool kEntropy, class Visitor = NoVisitor>
OnlineSoftmax reduce_row(const T* logits, int64_t vocabulary, double inverse_temperature, const Visitor& visit = {}) {
  float maximum = -INFINITY;
  WideVec e, ed;
  for (int64_t i = 0; i < vocabulary; i += kBlock) {
    const int64_t count = vocabulary - i < kBlock ? vocabulary - i : kBlock;
    const T* at = logits + i;
    if (maximum == -INFINITY) maximum = block_maximum(at, count);
    // Nothing but −inf so far: these tokens have probability 0, unless NaN is among them, which no maximum sees.
    if (maximum == -INFINITY && !any_nan(at, count)) continue;
    BlockSums block = block_sums<T, kEntropy>(at, count, maximum, inverse_temperature);
    if (cpu::count(greater(block.maximum, Vec(maximum)))) {
      const float higher = largest(block.maximum);
      const double shift = (static_cast<double>(maximum) - higher) * inverse_temperature * kLog2E;
      const double scale = std::exp2(shift);
      for (int half = 0; half < 2; ++half) {
        if constexpr (kEntropy) {
          ed.half[half] = scale == 0 ? Doubles(0.0) : (ed.half[half] + Doubles(shift) * e.half[half]) * Doubles(scale);
        }
        e.half[half] = e.half[half] * Doubles(scale);
      }
      maximum = higher;
      block = block_sums<T, kEntropy>(at, count, maximum, inverse_temperature);
    }
    e += widened(block.e);
    if constexpr (kEntropy) ed += widened(block.ed);
    visit(i, maximum, block);
  }
  OnlineSoftmax row;
  row.maximum = maximum;
  row.sum = sum(e);
  row.weighted = sum(ed) * kLn2;  // back to nats
  return row;
}

// The gradient over a row of logits, the chosen one apart; may be written over them.
template <bool kEntropy, class T, class G>
void gradient_row(const LogitGradient<Vec>& gradient, const T* logits, int64_t count, G* to) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    fetch_ahead(logits + i);
    Vec values[4];
    for (int j = 0; j < 4; ++j) values[j] = gradient.template of<kEntropy>(load_lanes(logits + i + j * kLanes));
    for (int j = 0; j < 4; ++j) store_lanes(to + i + j * kLanes, values[j]);
  }
  for (; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    store_lanes(to + i, gradient.template of<kEntropy>(load_lanes(logits + i, lanes)), lanes);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
