// Schulman's estimators of KL(π ‖ π_ref) from samples of π (2020, "Approximating KL divergence").
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

enum class KlEstimator { k1, k2, k3, abs };

template <class T>
RLHF_HOST_DEVICE T kl_penalty(T logprob, T ref_logprob, KlEstimator estimator) {
  const T d = logprob - ref_logprob;
  switch (estimator) {
    case KlEstimator::k1:
      return d;
    case KlEstimator::k2:
      return d * d * T(0.5f);
    case KlEstimator::k3:
      return exponential(T(0.0f) - d).less_line;
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
