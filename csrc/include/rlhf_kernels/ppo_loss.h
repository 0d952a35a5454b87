// The losses of PPO (Schulman et al. 2017, equation 7) and its relatives at one position, with gradient and statistics.
#pragma once

#include <optional>

#include "rlhf_kernels/kl_reward.h"
#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

// The statistics of the losses, in the order of rlhf_kernels/ops.py: of one position, summed over positions, or averaged.
// T is float or double.
template <class T>
struct PolicyStatistics {
  static constexpr int kCount = 7;
  T ratio = 0;        // ρ
  T log_ratio = 0;    // log ρ, before it is clamped
  T deviation = 0;    // |ρ − 1|; of several positions the largest, and NaN if one is
  T kl = 0;           // (ρ − 1) − log ρ
  T clipped = 0;      // 1 where the clipped loss is the one chosen
  T dual_clipped = 0; // 1 where the dual clip limits the loss
  T ref_kl = 0;       // k3 to the reference policy, where there is one

  template <class U>
  RLHF_HOST_DEVICE void add(const PolicyStatistics<U>& other) {
    ratio += other.ratio;
    log_ratio += other.log_ratio;
    deviation = other.deviation > deviation || other.deviation != other.deviation ? other.deviation : deviation;
    kl += other.kl;
    clipped += other.clipped;
    dual_clipped += other.dual_clipped;
    ref_kl += other.ref_kl;
  }

  // Averages from sums, where `share` is 1 over the number of unmasked positions.
  RLHF_HOST_DEVICE void store(float* to, double share) const {
    to[0] = static_cast<float>(ratio * share);
    to[1] = static_cast<float>(log_ratio * share);
    to[2] = static_cast<float>(deviation);
    to[3] = static_cast<float>(kl * share);
    to[4] = static_cast<float>(clipped * share);
    to[5] = static_cast<float>(dual_clipped * share);
    to[6] = static_cast<float>(ref_kl * share);
  }
};

// The linear loss has the entropy as well.
template <class T>
struct LinearPolicyStatistics : PolicyStatistics<T> {
  static constexpr int kCount = PolicyStatistics<T>::kCount + 1;
  T entropy = 0;

  template <class U>
  RLHF_HOST_DEVICE void add(const LinearPolicyStatistics<U>& other) {
    PolicyStatistics<T>::add(other);
    entropy += other.entropy;
  }

  RLHF_HOST_DEVICE void store(float* to, double share) const {
    PolicyStatistics<T>::store(to, share);
    to[kCount - 1] = static_cast<float>(entropy * share);
  }
};

template <class T>
struct ValueStatistics {
  static constexpr int kCount = 3;
  T value = 0;
  T target = 0;
  T clipped = 0;  // 1 where the clipped error is the larger

  template <class U>
  RLHF_HOST_DEVICE void add(const ValueStatistics<U>& other) {
    value += other.value;
    target += other.target;
    clipped += other.clipped;
  }

  RLHF_HOST_DEVICE void store(float* to, double share) const {
    to[0] = static_cast<float>(value * share);
    to[1] = static_cast<float>(target * share);
    to[2] = static_cast<float>(clipped * share);
  }
};

// Larger log-ratios are clamped to this, without a gradient: the ratio stays finite.
constexpr float kLargestLogRatio = kLargestWholeExponent;
constexpr float kLargestFloat = 3.4028234e38f;

struct PolicyOptions {
  double low;   // 1 − ε
  double high;  // 1 + ε_high
  double dual;  // c, where has_dual
  bool has_dual;
  bool cispo;             // −clip(ρ)·A·log π, in which ρ is a constant
  float least, largest;   // what the log-ratio is clamped to, without a gradient
  bool by_sequence;       // the log-ratio of a position is the mean of its row's
  double beta;            // of the k3 penalty, where there is a reference policy; 0: it is only reported

  // From the op's own options.
  static PolicyOptions of(double clip_low, double clip_high, std::optional<double> dual_clip,
                          std::optional<double> log_ratio_clamp, bool cispo, bool by_sequence, double beta) {
    const float largest = at_most(static_cast<float>(log_ratio_clamp.value_or(kLargestLogRatio)), kLargestLogRatio);
    const float least = log_ratio_clamp ? -static_cast<float>(*log_ratio_clamp) : -INFINITY;
    return {1 - clip_low, 1 + clip_high, dual_clip.value_or(0), dual_clip.has_value(), cispo, least, largest,
            by_sequence, beta};
  }
};

template <class T>
struct PolicyRatio {  // ρ = π/π_old
  T value;
  T lost;       // by the rounding of value
  T deviation;  // |ρ − 1|
  T kl;         // (ρ − 1) − log ρ
};

template <class T>
struct PolicyTerm {
  T loss;
  T loss_lost;  // by the rounding of loss; no number where loss is none
  T gradient;   // in the log-prob, weighted
  T clipped;    // 1 where the clipped loss is the one chosen
  T dual_clipped;  // 1 where the dual clip limits it
};

template <class T>
RLHF_HOST_DEVICE PolicyRatio<T> policy_ratio(T log_ratio, const PolicyOptions& options) {
  const auto power = bounded_exponential(at_least(at_most(log_ratio, T(options.largest)), T(options.least)));
  return {power.value, power.lost, absolute(power.value - T(1.0f)), power.less_line};
}

// −clip(ρ)·A·log π with a constant ρ (MiniMax 2025, arXiv 2506.13585, equation 4).
template <class T>
RLHF_HOST_DEVICE PolicyTerm<T> cispo_term(T logprob, T ratio, T ratio_lost, T gain, const PolicyOptions& options,
                                          T weight, T weight_lost) {
  const T zero(0.0f), one(1.0f), low(options.low), high(options.high);
  const T factor = at_least(at_most(ratio, high), low);
  const T factor_lost = where_greater(ratio, high, lost_by_conversion<T>(options.high),
                                      where_greater(low, ratio, lost_by_conversion<T>(options.low), ratio_lost));
  const T scaled = gain * factor, scaled_lost = multiply_add(gain, factor_lost, lost_by_product(gain, factor, scaled));
  PolicyTerm<T> term;
  term.loss = scaled * logprob;
  term.loss_lost = multiply_add(scaled_lost, logprob, lost_by_product(scaled, logprob, term.loss));
  const T rest = multiply_add(scaled, weight_lost, scaled_lost * weight);
  term.gradient = multiply_add(scaled, weight, where_greater(T(kLargestFloat), absolute(scaled), rest, zero));
  term.clipped = where_greater(ratio, high, one, where_greater(low, ratio, one, zero));
  term.dual_clipped = zero;
  return term;
}

// ratio and ratio_lost are of policy_ratio(log_ratio); weight, of which weight_lost is what its rounding lost, is the
// position's share of the reduced loss. Only CISPO reads logprob, which is 0 at masked positions.
template <class T>
RLHF_HOST_DEVICE PolicyTerm<T> policy_term(T logprob, T log_ratio, T ratio, T ratio_lost, T advantage,
                                           const PolicyOptions& options, T weight, T weight_lost) {
  const T zero(0.0f), one(1.0f), gain = zero - advantage;
  if (options.cispo) return cispo_term(logprob, ratio, ratio_lost, gain, options, weight, weight_lost);
  // Only one end of the clip range can raise the loss: the low end for a gain above 0, else the high end. What rounding
  // the end to T loses is kept too.
  const T end = where_greater(gain, zero, T(options.low), T(options.high));
  const T end_lost = where_greater(gain, zero, lost_by_conversion<T>(options.low), lost_by_conversion<T>(options.high));
  const T unclipped = gain * ratio, clipped = gain * end;
  const T factor = where_greater(clipped, unclipped, end, ratio);
  const T factor_lost = where_greater(clipped, unclipped, end_lost, ratio_lost);
  PolicyTerm<T> term;
  term.loss = at_least(unclipped, clipped);
  term.loss_lost = multiply_add(gain, factor_lost, lost_by_product(gain, factor, term.loss));
  // The gain is weighted first and multiplied by the ratio, which may be large, second: then the product overflows only if
  // the result does.
  const T share = gain * weight, share_lost = multiply_add(gain, weight_lost, lost_by_product(gain, weight, share));
  const T slope_lost = where_greater(T(kLargestFloat), absolute(share),
                                     multiply_add(share, ratio_lost, share_lost * ratio), zero);  // an infinite gain
  const T slope = multiply_add(share, ratio, slope_lost);
  const T inside = where_greater(log_ratio, T(options.largest), zero, where_greater(T(options.least), log_ratio, zero, slope));
  term.gradient = where_greater(clipped, unclipped, zero, inside);
  term.dual_clipped = zero;
  if (options.has_dual) {
    const T limit = T(options.dual) * gain;
    const T cut = where_greater(gain, zero, where_greater(term.loss, limit, one, zero), zero);
    term.loss = where_greater(cut, zero, limit, term.loss);
    term.loss_lost = where_greater(cut, zero, lost_by_product(T(options.dual), gain, limit), term.loss_lost);
    term.gradient = where_greater(cut, zero, zero, term.gradient);
    term.dual_clipped = cut;
  }
  term.clipped = where_greater(clipped, unclipped, one, zero);
  return term;
}

// The statistics of an unmasked position, without that of the reference policy.
template <class Statistics, class T>
RLHF_HOST_DEVICE Statistics statistics_of(T log_ratio, const PolicyRatio<T>& ratio, const PolicyTerm<T>& term) {
  Statistics here;
  here.ratio = static_cast<float>(ratio.value);
  here.log_ratio = static_cast<float>(log_ratio);
  here.deviation = static_cast<float>(ratio.deviation);
  here.kl = static_cast<float>(ratio.kl);
  here.clipped = static_cast<float>(term.clipped);
  here.dual_clipped = static_cast<float>(term.dual_clipped);
  return here;
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
    // A clipped value does not change with V, so its gradient is 0.
    term.gradient = where_greater(clipped_error, error, zero, distance);
  }
  return term;
}

}  // namespace rlhf_kernels
