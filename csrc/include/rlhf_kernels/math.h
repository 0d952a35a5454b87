// What the formulas in this folder are written in: the same source serves a C++ float, a vector of them on the CPU
// (csrc/cpu/vec.h overloads these names), and a CUDA thread.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define RLHF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RLHF_HOST_DEVICE inline
#endif

namespace rlhf_kernels {

// yes where a > b, else no; NaN is greater than nothing.
RLHF_HOST_DEVICE float where_greater(float a, float b, float yes, float no) { return a > b ? yes : no; }
RLHF_HOST_DEVICE float minimum(float a, float b) { return b < a || b != b ? b : a; }
RLHF_HOST_DEVICE float maximum(float a, float b) { return b > a || b != b ? b : a; }
// x unless it is beyond the limit; NaN stays. Cheaper than minimum and maximum, which look at both for NaN.
RLHF_HOST_DEVICE float at_most(float x, float limit) { return x > limit ? limit : x; }
RLHF_HOST_DEVICE float at_least(float x, float limit) { return x < limit ? limit : x; }
RLHF_HOST_DEVICE float absolute(float x) { return fabsf(x); }
RLHF_HOST_DEVICE float exponential(float x) { return expf(x); }
RLHF_HOST_DEVICE float reciprocal(float x) { return 1.0f / x; }
RLHF_HOST_DEVICE float power_of_two(float x) { return exp2f(x); }
RLHF_HOST_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// e^x − 1 − x given e^x: from its Taylor series where the difference would cancel, |x| < 1 (remainder below 1e-8 of it).
template <class T>
RLHF_HOST_DEVICE T exponential_minus_1_minus(T x, T exponential_of_x) {
  T series = T(1.0f / 39916800);  // 1/11!
  series = series * x + T(1.0f / 3628800);
  series = series * x + T(1.0f / 362880);
  series = series * x + T(1.0f / 40320);
  series = series * x + T(1.0f / 5040);
  series = series * x + T(1.0f / 720);
  series = series * x + T(1.0f / 120);
  series = series * x + T(1.0f / 24);
  series = series * x + T(1.0f / 6);
  series = series * x + T(0.5f);
  return where_greater(T(1.0f), absolute(x), series * x * x, exponential_of_x - T(1.0f) - x);
}

// log(1 + u) for u in [0, 1] from s = u/(2 + u) ≤ ⅓, as 2·artanh(s): a Chebyshev fit of artanh(s)/s in s², with a
// relative error below 1e-8 before rounding.
template <class T>
RLHF_HOST_DEVICE T logarithm_of_1_plus(T s) {
  const T square = s * s;
  T series = T(0.1408732831478119f);
  series = series * square + T(0.1398070901632309f);
  series = series * square + T(0.20012426376342773f);
  series = series * square + T(0.3333315849304199f);
  series = series * square + T(1.0f);
  return T(2.0f) * s * series;
}

}  // namespace rlhf_kernels
