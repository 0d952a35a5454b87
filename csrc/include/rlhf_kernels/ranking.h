// One pair of the reward model's ranking loss (Ouyang et al. 2022, equation 1).
#pragma once

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

template <class T>
struct RankingPair {
  T loss;   // −log σ(x), x = r_w − r_l − margin
  T slope;  // σ(−x), minus the derivative in x
};

// −log σ(x) = max(−x, 0) + log(1 + e^−|x|), and σ(−x) from the same exponential; neither overflows.
template <class T>
RLHF_HOST_DEVICE RankingPair<T> ranking_pair(T x) {
  const T zero(0.0f), one(1.0f);
  const T small = exponential(minus_absolute(x)).value, more = one + small, most = one + more;
  const T both = reciprocal(more * most);  // one division for two: σ(|x|), and the argument of the logarithm's series
  const T tail = both * most;
  return {at_least(zero - x, zero) + logarithm_of_1_plus(small * both * more), where_greater(x, zero, small * tail, tail)};
}

}  // namespace rlhf_kernels
