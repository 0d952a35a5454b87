// Schulman's estimators of KL(π ‖ π_ref) from samples of π (2020, "Approximating KL divergence").
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

enum class KlEstimator { k1, k2, k3, abs };

// e^x − 1 − x with x = log π_ref − log π. What rounding took from x is put back where x is a number. For x = ∞ the result
// is ∞, not ∞ − ∞.
template <class T>
RLHF_HOST_DEVICE T k3_penalty(T logprob, T ref_logprob) {
  const T x = ref_logprob - logprob;
  const auto power = exponential(x);
  const T lost = lost_by_difference(ref_logprob, logprob, x);
  const T near = multiply_add(lost, power.value - T(1.0f), power.less_line);
  // For larger |x| the terms cancel less, but every step keeps what its rounding lost.
  const T line = T(1.0f) + x, line_lost = x - (line - T(1.0f));
  const T difference = power.value - line, difference_lost = (power.value - difference) - line;
  const T far = difference + (difference_lost + (multiply_add(power.value, lost, power.lost) - line_lost));
  return where_greater(T(0.34f), absolute(x), near,
                       where_greater(T(88.0f), absolute(x), far,
                                     where_greater(x, T(0.0f), power.value, power.less_line)));
}

// 1 − e^x, its derivative in log π.
template <class T>
RLHF_HOST_DEVICE T k3_gradient(T logprob, T ref_logprob) {
  const T x = ref_logprob - logprob;
  const auto power = exponential(x);
  return where_greater(T(0.34f), absolute(x), T(0.0f) - (x + power.less_line), (T(1.0f) - power.value) - power.lost);
}

template <class T>
RLHF_HOST_DEVICE T kl_penalty(T logprob, T ref_logprob, KlEstimator estimator) {
  const T d = logprob - ref_logprob;
  switch (estimator) {
    case KlEstimator::k1:
      return d;
    case KlEstimator::k2:
      return d * d * T(0.5f);
    case KlEstimator::k3:
      return k3_penalty(logprob, ref_logprob);
    default:
      return absolute(d);
  }
}

// Its derivative in log π; in log π_ref it is the negative.
template <class T>
RLHF_HOST_DEVICE T kl_penalty_gradient(T logprob, T ref_logprob, KlEstimator estimator) {
  const T d = logprob - ref_logprob;
  switch (estimator) {
    case KlEstimator::k1:
      return T(1.0f);
    case KlEstimator::k2:
      return d;
    case KlEstimator::k3:
      return k3_gradient(logprob, ref_logprob);
    default:
      return where_greater(d, T(0.0f), T(1.0f), where_greater(T(0.0f), d, T(-1.0f), T(0.0f)));
  }
}

}  // namespace rlhf_kernels
