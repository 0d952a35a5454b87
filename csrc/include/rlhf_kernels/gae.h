// Generalized advantage estimation (Schulman et al. 2016, equations 11, 12 and 16), one position at a time.
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

// δ_t = r_t + γ·V_{t+1} − V_t, where t + 1 is the next unmasked position.
template <class T>
RLHF_HOST_DEVICE T gae_delta(T reward, T value, T next_value, T gamma) {
  return multiply_add(gamma, next_value, reward - value);
}

// A_t = δ_t + γλ·A_{t+1}.
template <class T>
RLHF_HOST_DEVICE T gae_advantage(T delta, T gamma_lambda, T after) {
  return multiply_add(gamma_lambda, after, delta);
}

// Count, mean and sum of squared distances to the mean; merged as in Chan, Golub and LeVeque 1979.
struct Moments {
  double count = 0;
  double mean = 0;
  double squares = 0;
};

RLHF_HOST_DEVICE void merge(Moments& all, const Moments& part) {
  if (part.count == 0) return;
  const double count = all.count + part.count;
  const double distance = part.mean - all.mean;
  all.mean += distance * part.count / count;
  all.squares += part.squares + distance * distance * all.count * part.count / count;
  all.count = count;
}

}  // namespace rlhf_kernels
