// The arithmetic that the formulas in this folder are written in. The same source serves a C++ float, a vector of floats on
// the CPU (csrc/cpu/vec.h overloads these names), and a CUDA thread.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define RLHF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RLHF_HOST_DEVICE inline
#endif

namespace rlhf_kernels {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr double kLog2E = 1.44269504088896341, kLn2 = 0.69314718055994531;

// yes where a > b, else no; NaN is greater than nothing.
RLHF_HOST_DEVICE float where_greater(float a, float b, float yes, float no) { return a > b ? yes : no; }
RLHF_HOST_DEVICE double where_greater(double a, double b, double yes, double no) { return a > b ? yes : no; }
RLHF_HOST_DEVICE float minimum(float a, float b) { return b < a || b != b ? b : a; }
RLHF_HOST_DEVICE float maximum(float a, float b) { return b > a || b != b ? b : a; }
// x unless it is beyond the limit; NaN stays. Cheaper than minimum and maximum, which look at both for NaN.
RLHF_HOST_DEVICE float at_most(float x, float limit) { return x > limit ? limit : x; }
RLHF_HOST_DEVICE double at_most(double x, double limit) { return x > limit ? limit : x; }
RLHF_HOST_DEVICE float at_least(float x, float limit) { return x < limit ? limit : x; }
RLHF_HOST_DEVICE double at_least(double x, double limit) { return x < limit ? limit : x; }
RLHF_HOST_DEVICE float absolute(float x) { return fabsf(x); }
RLHF_HOST_DEVICE double absolute(double x) { return fabs(x); }
RLHF_HOST_DEVICE float minus_absolute(float x) { return -fabsf(x); }
RLHF_HOST_DEVICE float reciprocal(float x) { return 1.0f / x; }
RLHF_HOST_DEVICE float power_of_two(float x) { return exp2f(x); }
RLHF_HOST_DEVICE float power_of_e(float x) { return expf(x); }
RLHF_HOST_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
RLHF_HOST_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
// What rounding took from product = a·b.
RLHF_HOST_DEVICE float lost_by_product(float a, float b, float product) { return fmaf(a, b, -product); }
RLHF_HOST_DEVICE double lost_by_product(double a, double b, double product) { return fma(a, b, -product); }
RLHF_HOST_DEVICE float nearest_integer(float x) { return rintf(x); }
// x·2^n for an integral n, rounded only once even where the result is subnormal.
RLHF_HOST_DEVICE float times_power_of_two(float x, float n) { return ldexpf(x, static_cast<int>(n)); }

// What rounding took from difference = a − b (Knuth's two-sum). NaN where the difference is not finite.
template <class T>
RLHF_HOST_DEVICE T lost_by_difference(T a, T b, T difference) {
  const T minus_b = difference - a;
  return (a - (difference - minus_b)) - (b + minus_b);
}

// What is lost when the double x is rounded to T, a float or a vector of floats.
template <class T>
RLHF_HOST_DEVICE T lost_by_conversion(double x) {
  return T(static_cast<float>(x - static_cast<double>(static_cast<float>(x))));
}
template <>
RLHF_HOST_DEVICE double lost_by_conversion<double>(double) {
  return 0;
}

template <class T>
struct Exponential {
  T value;     // e^x, within 0.63 ulp
  T lost;      // by the rounding of value
  T less_line; // e^x − 1 − x, without its cancellation
};

// Below this e^x rounds to 0 in float32; above the other it is infinite.
constexpr float kSmallestExponent = -104.0f;
constexpr float kLargestExponent = 89.0f;
// The largest whole one of which e^x is finite.
constexpr float kLargestWholeExponent = 88.0f;

// Of x up to kLargestExponent. x = n·ln 2 + r with ln 2 in two parts; e^r = 1 + r + r²·p(r), p of degree 5 as in Cephes'
// expf. Of the three results the compiler drops those that are not used.
template <class T>
RLHF_HOST_DEVICE Exponential<T> bounded_exponential(T x) {
  const T one(1.0f);
  const T bounded = at_least(x, T(kSmallestExponent));
  const T n = nearest_integer(bounded * T(static_cast<float>(kLog2E)));
  const T high = multiply_add(n, T(-0.693359375f), bounded), r = multiply_add(n, T(2.12194440e-4f), high);
  // The polynomial's halves are computed side by side (Estrin's scheme), so that the result is there sooner.
  const T square = r * r;
  T p = multiply_add(T(1.9875691500e-4f), r, T(1.3981999507e-3f));
  p = multiply_add(p, square, multiply_add(T(8.3334519073e-3f), r, T(4.1665795894e-2f)));
  p = multiply_add(p, square, multiply_add(T(1.6666665459e-1f), r, T(5.0000001201e-1f)));
  // What rounding takes from r and from 1 + r is kept, since either can be as large as the result's last digit.
  const T r_lost = multiply_add(n, T(2.12194440e-4f), high - r), one_and_r = one + r;
  const T rest = multiply_add(p, square, (r - (one_and_r - one)) + r_lost), whole = one_and_r + rest;
  Exponential<T> result;
  result.value = times_power_of_two(whole, n);
  result.lost = times_power_of_two((one_and_r - whole) + rest, n);
  // For n = 0, e^x − 1 − x is at hand already. For other n, e^x is large enough for the subtraction to be harmless.
  result.less_line = where_greater(one, absolute(n), p * square, result.value - ((one + x) - result.lost));
  return result;
}

// In double precision, where the standard library's are good enough.
RLHF_HOST_DEVICE Exponential<double> bounded_exponential(double x) {
  const double value = exp(x);
  return {value, 0, expm1(x) - x};
}

template <class T>
RLHF_HOST_DEVICE Exponential<T> exponential(T x) {
  return bounded_exponential(at_most(x, T(kLargestExponent)));
}

}  // namespace rlhf_kernels
