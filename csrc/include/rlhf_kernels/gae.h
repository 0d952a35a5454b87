// Generalized advantage estimation (Schulman et al. 2016, equations 11, 12 and 16), one position at a time.
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

// What a position needs to know of those after it.
struct GaeCarry {
  double advantage;
  double next_value;
};

// A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·V_{t+1} − V_t; a masked position hands on what it was given.
// Written without a branch: masks are ragged, and a mispredicted branch costs more than the arithmetic.
RLHF_HOST_DEVICE GaeCarry gae_step(
    GaeCarry after, double reward, double value, bool wanted, double gamma, double gamma_lambda) {
  const double delta = (reward - value) + gamma * after.next_value;
  return {wanted ? delta + gamma_lambda * after.advantage : after.advantage, wanted ? value : after.next_value};
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
