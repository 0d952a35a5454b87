// One pair of the reward model's ranking loss (Ouyang et al. 2022, equation 1).
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

template <class T>
struct RankingPair {  // of x = r_w − r_l − margin: −log σ(x) = log(1 + tail) − shortfall
  T shortfall;        // min(x, 0)
  T tail;             // e^−|x|
  T slope;            // σ(−x), minus the derivative in x
};

template <class T>
RLHF_HOST_DEVICE RankingPair<T> ranking_pair(T x) {
  const T zero(0.0f), one(1.0f);
  const T tail = power_of_e(at_least(minus_absolute(x), T(kSmallestExponent)));
  return {at_most(x, zero), tail, where_greater(x, zero, tail, one) * reciprocal(one + tail)};
}

// Π(1 + tail) − 1 with one more tail: many pairs take one logarithm. Nothing cancels, and in float32 up to 127 pairs can't
// overflow.
template <class T>
RLHF_HOST_DEVICE T with_tail(T product, T tail) {
  return multiply_add(product, T(1.0f) + tail, tail);
}

}  // namespace rlhf_kernels
