// Schulman's estimators of KL(π ‖ π_ref) from samples of π (2020, "Approximating KL divergence").
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

enum class KlEstimator { k1, k2, k3, abs };

// Below this |x|, exponential(x) has e^x − 1 − x without cancellation (n = 0): a little under ½·ln 2.
constexpr float kNear = 0.34f;

// e^x − 1 − x with x = log π_ref − log π. `lost` is what rounding took from x; it is put back times the derivative, e^x − 1.
// Beyond kLargestWholeExponent `lost` may be NaN and is left out; for x = ∞ the result is ∞, not ∞ − ∞.
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
  return where_greater(T(kNear), absolute(x), near,
                       where_greater(T(kLargestWholeExponent), absolute(x), far,
                                     where_greater(x, T(0.0f), power.value, power.less_line)));
}

// 1 − e^x, its derivative in log π.
template <class T>
RLHF_HOST_DEVICE T k3_gradient(T logprob, T ref_logprob) {
  const T x = ref_logprob - logprob;
  const auto power = exponential(x);
  return where_greater(T(kNear), absolute(x), T(0.0f) - (x + power.less_line), (T(1.0f) - power.value) - power.lost);
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

// The score of a completion, clipped to ±score_clip unless that is below 0; NaN stays.
RLHF_HOST_DEVICE double clipped_score(double score, double score_clip) {
  return score_clip < 0 ? score : at_least(at_most(score, score_clip), -score_clip);
}

// The reward of one position: −β·k, and the score at a completion's last position (else 0), rounded once.
RLHF_HOST_DEVICE float shaped_reward(double score, double beta, float kl) {
  return static_cast<float>(score - beta * static_cast<double>(kl));
}

}  // namespace rlhf_kernels
