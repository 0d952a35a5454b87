// float16 as bits, for the emulation beside this file.
#pragma once

#include <torch/headeronly/util/Half.h>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return static_cast<float>(c10::Half(x.bits, c10::Half::from_bits())); }
inline __half __float2half_rn(float x) { return {c10::Half(x).x}; }
