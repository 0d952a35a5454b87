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

RLHF_HOST_DEVICE float where(bool condition, float yes, float no) { return condition ? yes : no; }
RLHF_HOST_DEVICE double where(bool condition, double yes, double no) { return condition ? yes : no; }
RLHF_HOST_DEVICE float minimum(float a, float b) { return b < a ? b : a; }
RLHF_HOST_DEVICE float maximum(float a, float b) { return b > a ? b : a; }
RLHF_HOST_DEVICE float absolute(float x) { return fabsf(x); }
RLHF_HOST_DEVICE float exponential(float x) { return expf(x); }
RLHF_HOST_DEVICE float exponential_minus_1(float x) { return expm1f(x); }
RLHF_HOST_DEVICE float logarithm_of_1_plus(float x) { return log1pf(x); }

}  // namespace rlhf_kernels
