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

// Takes in a part of the row whose sums are relative to its own maximum. Exact up to rounding, in any grouping; callers
// that promise the same bits every time keep to one order.
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
  const double shift = (static_cast<double>(low.maximum) - all.maximum) * inverse_temperature;
  // No logit above −inf in the lower part: it adds nothing, and 0·inf would be NaN.
  if (shift == -static_cast<double>(INFINITY)) return;
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

// d(go·log p_chosen + gh·H) / d logit for a logit that was not chosen, given its log p: −p·(go + gh·(log p + H))·1/τ.
// The chosen one gets go/τ on top.
template <class T>
RLHF_HOST_DEVICE T logit_gradient(T log_p, T grad_logprob, T grad_entropy, T entropy, T inverse_temperature) {
  return (T(0.0f) - exponential(log_p)) * (grad_logprob + grad_entropy * (log_p + entropy)) * inverse_temperature;
}

}  // namespace rlhf_kernels
