// Schulman's estimators of KL(π ‖ π_ref) from samples of π (2020, "Approximating KL divergence").
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

enum class KlEstimator { k1, k2, k3, abs };

// e^x − 1 − x with x = log π_ref − log π, and with what the difference lost, as long as both are numbers.
template <class T>
RLHF_HOST_DEVICE T k3_penalty(T logprob, T ref_logprob) {
  const T x = ref_logprob - logprob;
  const auto power = exponential(x);
  return where_greater(T(88.0f), absolute(x),
                       multiply_add(lost_by_difference(ref_logprob, logprob, x), power.value - T(1.0f), power.less_line),
                       power.less_line);
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
      return d - exponential(T(0.0f) - d).less_line;
    default:
      return where_greater(d, T(0.0f), T(1.0f), where_greater(T(0.0f), d, T(-1.0f), T(0.0f)));
  }
}

}  // namespace rlhf_kernels
