// The running sums from which a row's log-prob and entropy follow, in one pass over its logits.
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

// Of the logits seen so far, with d = (logit − maximum) / temperature: Σ e^d and Σ e^d·d (Milakov and Gimelshein 2018,
// arXiv 1805.02867, with the second sum for the entropy).
struct OnlineSoftmax {
  float maximum = -INFINITY;
  double sum = 0;
  double weighted = 0;
};

// Adds the sums of another part of the row, which are relative to that part's own maximum. Parts may be merged in any
// grouping, exact up to rounding; for the same bits every time, callers keep to one order.
RLHF_HOST_DEVICE void merge(OnlineSoftmax& all, const OnlineSoftmax& part, double inverse_temperature) {
  if (part.sum == 0) return;
  if (all.sum == 0) {
    all = part;
    return;
  }
  OnlineSoftmax low = part;
  if (part.maximum > all.maximum) {
    low = all;
    all = part;
  }
  // Where all logits of the lower part are −inf it adds nothing, and multiplying would give 0·inf, which is NaN. Where they
  // are all NaN, which no maximum sees, the whole row is NaN.
  if (low.maximum == -INFINITY) {
    if (low.sum != low.sum) all.sum = all.weighted = low.sum;
    return;
  }
  const double shift = (static_cast<double>(low.maximum) - all.maximum) * inverse_temperature;
  const double scale = exp(shift);
  all.weighted += (low.weighted + shift * low.sum) * scale;
  all.sum += low.sum * scale;
}

// H = log Σ e^d − Σ e^d·d / Σ e^d, in nats.
RLHF_HOST_DEVICE double entropy(const OnlineSoftmax& row) { return log(row.sum) - row.weighted / row.sum; }

// log p of one logit of the row.
RLHF_HOST_DEVICE double log_prob(const OnlineSoftmax& row, float logit, double inverse_temperature) {
  return (static_cast<double>(logit) - row.maximum) * inverse_temperature - log(row.sum);
}

// Rounds to 0 as a power of 2 in float32.
constexpr float kVanishing = -150.0f;

// The gradient d(go·log p_chosen + gh·H) / d logit of the logits that were not chosen, −p·(go + gh·(log p + H))/τ, as a
// function of the logit, in powers of 2. The chosen one gets go/τ on top.
template <class T>
struct LogitGradient {
  T maximum, scale, log2_sum;  // log₂ p = (logit − maximum)·scale − log2_sum
  T slope, offset;             // the gradient is p·(slope·log₂ p + offset)

  // log_sum = log Σ e^d. Where no gradient of the entropy is asked for, `entropy` and its gradient are not read.
  RLHF_HOST_DEVICE LogitGradient(float row_maximum, float log_sum, float entropy, float grad_logprob,
                                 float grad_entropy, double inverse_temperature)
      : maximum(row_maximum),
        scale(static_cast<float>(kLog2E * inverse_temperature)),
        log2_sum(static_cast<float>(kLog2E * log_sum)),
        slope(static_cast<float>(-kLn2 * grad_entropy * inverse_temperature)),
        offset(static_cast<float>(-(grad_logprob + (grad_entropy == 0 ? 0.0 : double{grad_entropy} * entropy)) *
                                  inverse_temperature)) {}

  template <bool kEntropy>
  RLHF_HOST_DEVICE T of(T logit) const {
    // A banned token's log-prob of −inf would give 0·inf, which is NaN.
    const T log2_p = at_least(multiply_add(logit - maximum, scale, T(0.0f) - log2_sum), T(kVanishing));
    const T p = power_of_two(log2_p);
    if constexpr (kEntropy) return p * multiply_add(slope, log2_p, offset);
    return p * offset;
  }
};

// The same for the chosen logit.
RLHF_HOST_DEVICE double chosen_logit_gradient(double logit, double maximum, double log_sum, double entropy,
                                              double grad_logprob, double grad_entropy, double inverse_temperature) {
  const double log_p = (logit - maximum) * inverse_temperature - log_sum, p = exp(log_p);
  const double from_entropy = grad_entropy == 0 || p == 0 ? 0.0 : p * grad_entropy * (log_p + entropy);
  return (grad_logprob * (1 - p) - from_entropy) * inverse_temperature;
}

}  // namespace rlhf_kernels
