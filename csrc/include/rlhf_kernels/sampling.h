// How a token is drawn: one random number per row, a function of (seed, stream, step) alone, and the token at which the
// cumulated probability passes it.
#pragma once

#include <cstdint>

#include "rlhf_kernels/math.h"

namespace rlhf_kernels {

struct PhiloxWords {
  uint32_t at[4];
};

// Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a bijection of the counter for
// every key. The low words come first.
RLHF_HOST_DEVICE PhiloxWords philox(uint64_t key, uint64_t low, uint64_t high) {
  PhiloxWords c{{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                 static_cast<uint32_t>(high >> 32)}};
  uint32_t key_0 = static_cast<uint32_t>(key), key_1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c.at[0], b = uint64_t{0xCD9E8D57u} * c.at[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.at[1] ^ key_0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.at[3] ^ key_1, static_cast<uint32_t>(a)}};
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return c;
}

// Uniform among the odd multiples of 2^−53 in (0, 1), each of which a double holds exactly: so neither 0 nor 1 comes up,
// which would let a token of probability 0 through.
RLHF_HOST_DEVICE double uniform(uint64_t seed, int64_t stream, int64_t step) {
  const PhiloxWords random = philox(seed, static_cast<uint64_t>(stream), static_cast<uint64_t>(step));
  const uint64_t bits = (uint64_t{random.at[1]} << 32 | random.at[0]) >> 12;
  return (static_cast<double>(bits) + 0.5) * (1.0 / (uint64_t{1} << 52));
}

// The first of `count` parts with which the sum of their weights passes the target. Where rounding leaves none, the last
// one that has a weight. `passed` is the sum of what comes before, on entry of all parts and on return of the one found.
template <class Weight>
RLHF_HOST_DEVICE int64_t part_at(double target, double& passed, int64_t count, Weight&& weight) {
  int64_t last = 0;
  double before_last = passed;
  for (int64_t i = 0; i < count; ++i) {
    const double here = weight(i);
    if (!(here > 0)) continue;
    if (passed + here > target) return i;
    last = i;
    before_last = passed;
    passed += here;
  }
  passed = before_last;
  return last;
}

}  // namespace rlhf_kernels
