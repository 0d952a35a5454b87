// Vectors from memory and to it.
#pragma once

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/vec/lanes.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

// Calls function with a null pointer of the element type.
template <class Function>
inline void for_dtype(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::float32:
      return function(static_cast<float*>(nullptr));
    case Dtype::bfloat16:
      return function(static_cast<c10::BFloat16*>(nullptr));
    case Dtype::float16:
      return function(static_cast<c10::Half*>(nullptr));
  }
}

// The first count of a vector, whatever the element type; the rest is 0.
template <class T>
inline Vec load_lanes(const T* from, int64_t count = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    return count == kLanes ? Vec::loadu(from) : Vec::loadu(from, count);
  } else {
    if (count == kLanes) {
#if defined(CPU_CAPABILITY_AVX512)
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      } else {
        return _mm512_cvtph_ps(bits);
      }
#elif defined(CPU_CAPABILITY_AVX2)
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
      } else {
        return _mm256_cvtph_ps(bits);
      }
#elif defined(__aarch64__)
      const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(from));
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
      } else {
        return vcvt_f32_f16(vreinterpret_f16_u16(bits));
      }
#endif
    }
    float values[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(from[i]);
    return Vec::loadu(values);
  }
}

// The first count of a vector, and fill in the other lanes.
template <class T>
inline Vec load_lanes_or(const T* from, int64_t count, float fill) {
  const Vec values = load_lanes(from, count);
  return count == kLanes ? values : Vec::set(Vec(fill), values, count);
}

#if defined(__aarch64__)
// Rounded to nearest, ties to even; any NaN to the one that c10::BFloat16 makes of it.
inline uint16x4_t bfloat16_bits(const Vec& values) {
  const uint32x4_t bits = vreinterpretq_u32_f32(values);
  const uint32x4_t last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint16x4_t nearest = vaddhn_u32(bits, vaddq_u32(last, vdupq_n_u32(0x7fff)));
  return vbsl_u16(vmovn_u32(vceqq_f32(values, values)), nearest, vdup_n_u16(0x7fc0));
}
#endif

template <class T>
inline void store_lanes(T* to, const Vec& values, int64_t count = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kLanes) {
      values.store(to);
    } else {
      values.store(to, static_cast<int>(count));
    }
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    if (count == kLanes) {
      const __m256i bits = std::is_same_v<T, c10::BFloat16>
                               ? at::vec::cvtfp32_bf16(static_cast<__m512>(values))
                               : at::vec::cvtfp32_fp16(static_cast<__m512>(values));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
      return;
    }
#elif defined(CPU_CAPABILITY_AVX2)
    if (count == kLanes) {
      const __m128i bits = std::is_same_v<T, c10::BFloat16>
                               ? at::vec::cvtfp32_bf16(static_cast<__m256>(values))
                               : at::vec::cvtfp32_fp16(static_cast<__m256>(values));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
      return;
    }
#elif defined(__aarch64__)
    if (count == kLanes) {
      const uint16x4_t bits = std::is_same_v<T, c10::BFloat16> ? bfloat16_bits(values)
                                                               : vreinterpret_u16_f16(vcvt_f16_f32(values));
      vst1_u16(reinterpret_cast<uint16_t*>(to), bits);
      return;
    }
#endif
    float buffer[kLanes];
    values.store(buffer);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(buffer[i]);
  }
}

// The lanes whose byte is not 0.
inline Lanes lanes_of(const uint8_t* wanted, int64_t count = kLanes) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = count == kLanes ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(wanted))
                                        : _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), wanted);
  return {_mm_test_epi8_mask(bytes, bytes)};
#else
#if defined(CPU_CAPABILITY_AVX2)
  if (count == kLanes) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(wanted)));
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(bytes, _mm256_setzero_si256()))};
  }
#elif defined(__aarch64__)
  if (count == kLanes) {
    uint32_t bits;
    std::memcpy(&bits, wanted, sizeof bits);
    const uint32x4_t bytes = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bits))));
    return {vreinterpretq_f32_u32(vtstq_u32(bytes, bytes))};
  }
#endif
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = wanted[i] ? 1.0f : 0.0f;
  return {Vec::loadu(values) > Vec(0.0f)};
#endif
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
