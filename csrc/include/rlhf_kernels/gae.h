// Generalized advantage estimation (Schulman et al. 2016, equations 11, 12 and 16), one position at a time.
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

// δ_t = r_t + γ·V_{t+1} − V_t, where t + 1 is the next unmasked position.
template <class T>
RLHF_HOST_DEVICE T gae_delta(T reward, T value, T next_value, T gamma) {
  return multiply_add(gamma, next_value, reward - value);
}

// The same where γ·V_{t+1} is at hand already.
RLHF_HOST_DEVICE double gae_delta(double reward, double value, double discounted_next) {
  return discounted_next + (reward - value);
}

// A_t = δ_t + γλ·A_{t+1}.
template <class T>
RLHF_HOST_DEVICE T gae_advantage(T delta, T gamma_lambda, T after) {
  return multiply_add(gamma_lambda, after, delta);
}

// What a position needs from its right: the advantage of the next unmasked position, and that position's γ·V. At the end
// of a sequence: 0, and γ times the bootstrap value plus the score that the last unmasked position gets.
struct GaeState {
  double advantage;
  double next;
  bool seen;  // whether some position to the right counts
};

// How a stretch of positions changes the state to its right, (A', n'): its first unmasked position has the advantage
// slope·A' + following·n' + offset, and the new `next` is that position's γ·V. The recursion of equation 16 is a composition
// of such affine maps, which may be grouped in any way (Blelloch 1990). A stretch that is all masked changes nothing.
struct GaeMap {
  double slope = 1, following = 0, offset = 0, next = 0;
  bool counts = false;

  // Extends the stretch by the position to its left, which must be unmasked.
  RLHF_HOST_DEVICE void take(double reward, double value, double gamma, double gamma_lambda) {
    offset = counts ? fma(gamma_lambda, offset, gae_delta(reward, value, next)) : gae_delta(reward, value, 0);
    following = counts ? gamma_lambda * following : 1;
    slope = gamma_lambda * slope;
    next = gamma * value;
    counts = true;
  }

  RLHF_HOST_DEVICE GaeState applied(const GaeState& right) const {
    if (!counts) return right;
    return {fma(slope, right.advantage, fma(following, right.next, offset)), next, true};
  }
};

// The map of two neighbouring stretches together.
RLHF_HOST_DEVICE GaeMap joined(const GaeMap& left, const GaeMap& right) {
  if (!left.counts) return right;
  if (!right.counts) return left;
  GaeMap both;
  both.slope = left.slope * right.slope;
  both.following = left.slope * right.following;
  both.offset = fma(left.slope, right.offset, fma(left.following, right.next, left.offset));
  both.next = left.next;
  both.counts = true;
  return both;
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

// Added to the variance before its root is taken.
constexpr double kVarianceEpsilon = 1e-8;

// What whitening multiplies by, after taking off the mean. The unbiased variance has one degree of freedom less.
RLHF_HOST_DEVICE double whitening_scale(const Moments& all, bool unbiased) {
  const double degrees = unbiased && all.count > 1 ? all.count - 1 : all.count;
  return degrees > 0 ? 1.0 / sqrt(all.squares / degrees + kVarianceEpsilon) : 0.0;
}

}  // namespace rlhf_kernels
