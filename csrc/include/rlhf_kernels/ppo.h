// PPO's clipped losses at one position (Schulman et al. 2017, equation 7), with gradient and statistics.
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

struct PolicyClip {
  float low;        // 1 − ε
  float high;       // 1 + ε_high
  float dual;       // c, where has_dual
  bool has_dual;
};

template <class T>
struct PolicyTerm {
  T loss;
  T gradient;  // in the log-prob
  T ratio;
  T deviation;  // |ρ − 1|
  T kl;         // (ρ − 1) − log ρ
  T clipped;    // 1 where the clipped loss is the one chosen
};

// e^88 is the largest power that is finite in float32: beyond it the ratio stays there, and has no gradient.
constexpr float kLargestLogRatio = 88.0f;

template <class T>
RLHF_HOST_DEVICE PolicyTerm<T> policy_term(T logprob, T old_logprob, T advantage, const PolicyClip& clip) {
  const T zero(0.0f), one(1.0f);
  const T raw = logprob - old_logprob;
  const T log_ratio = at_most(raw, T(kLargestLogRatio));
  const T ratio = exponential(log_ratio);
  const T kept = at_most(at_least(ratio, T(clip.low)), T(clip.high));
  const T unclipped_loss = (zero - advantage) * ratio;
  const T clipped_loss = (zero - advantage) * kept;
  PolicyTerm<T> term;
  term.loss = at_least(unclipped_loss, clipped_loss);
  term.gradient = where_greater(clipped_loss, unclipped_loss, zero,
                                where_greater(raw, T(kLargestLogRatio), zero, unclipped_loss));
  if (clip.has_dual) {
    const T limit = T(-clip.dual) * advantage;
    const T cut = where_greater(zero, advantage, where_greater(term.loss, limit, one, zero), zero);
    term.loss = where_greater(cut, zero, limit, term.loss);
    term.gradient = where_greater(cut, zero, zero, term.gradient);
  }
  term.ratio = ratio;
  term.deviation = absolute(ratio - one);
  term.kl = exponential_minus_1_minus(log_ratio, ratio);
  term.clipped = where_greater(clipped_loss, unclipped_loss, one, zero);
  return term;
}

template <class T>
struct ValueTerm {
  T loss;
  T gradient;  // in the value
  T clipped;
};

// ½·max((V − R)², (clip(V, V_old ± ε) − R)²); clip_range below 0 means no clipping.
template <class T>
RLHF_HOST_DEVICE ValueTerm<T> value_term(T value, T old_value, T target, float clip_range) {
  const T zero(0.0f), one(1.0f);
  const T distance = value - target;
  const T error = distance * distance;
  ValueTerm<T> term{error * T(0.5f), distance, zero};
  if (clip_range >= 0) {
    const T low = old_value - T(clip_range), high = old_value + T(clip_range);
    const T clipped_distance = minimum(maximum(value, low), high) - target;
    const T clipped_error = clipped_distance * clipped_distance;
    term.clipped = where_greater(clipped_error, error, one, zero);
    term.loss = maximum(error, clipped_error) * T(0.5f);
    // A clipped value does not move with V.
    term.gradient = where_greater(clipped_error, error, zero, distance);
  }
  return term;
}

}  // namespace rlhf_kernels
