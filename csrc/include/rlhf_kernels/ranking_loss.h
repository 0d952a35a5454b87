// One pair of the reward model's ranking loss (Ouyang et al. 2022, equation 1).
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

// With x = r_w − r_l − margin: −log σ(x) = log(1 + tail) − min(x, 0). This is Σ min(x, 0), from the sum of the differences
// r_w − r_l and the number of the pairs that have x below 0. Were x itself summed, the margin would lose the same digits in
// every pair where scores are bfloat16, since their differences are multiples of one power of two.
template <class T>
RLHF_HOST_DEVICE T sum_below_zero(T differences, T pairs, T margin) {
  return differences - pairs * margin;
}

// e^−|x|
template <class T>
RLHF_HOST_DEVICE T pair_tail(T x) {
  return power_of_e(at_least(minus_absolute(x), T(kSmallestExponent)));
}

// σ(−x), minus the derivative in x.
template <class T>
RLHF_HOST_DEVICE T pair_slope(T x, T tail) {
  const T one(1.0f);
  return where_greater(x, T(0.0f), tail, one) * reciprocal(one + tail);
}

// Takes one more tail into Π(1 + tail) − 1, so that many pairs need one logarithm. Nothing cancels, and the product of up to
// 127 pairs cannot overflow in float32.
template <class T>
RLHF_HOST_DEVICE T with_tail(T product, T tail) {
  return multiply_add(product, T(1.0f) + tail, tail);
}

}  // namespace rlhf_kernels
