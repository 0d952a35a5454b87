// One pair of the reward model's ranking loss (Ouyang et al. 2022, equation 1).
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

template <class T>
struct RankingPair {
  T loss;      // −log σ(x), x = r_w − r_l − margin
  T gradient;  // in x: −σ(−x)
};

// −log σ(x) = max(−x, 0) + log(1 + e^−|x|), and σ(−x) from the same exponential; neither overflows.
template <class T>
RLHF_HOST_DEVICE RankingPair<T> ranking_pair(T x) {
  const T zero(0.0f), one(1.0f);
  const T small = exponential(zero - absolute(x));
  const T tail = one / (one + small);  // σ(|x|)
  return {maximum(zero - x, zero) + logarithm_of_1_plus(small), zero - where_greater(x, zero, small * tail, tail)};
}

}  // namespace rlhf_kernels
