// The two halves of a vector in double precision.
#pragma once

#include "cpu/vec/lanes.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

using Doubles = at::vec::Vectorized<double>;
constexpr int64_t kHalf = kLanes / 2;
static_assert(Doubles::size() == kHalf);

struct WideVec {
  Doubles half[2] = {Doubles(0.0), Doubles(0.0)};

  WideVec& operator+=(const WideVec& other) {
    for (int i = 0; i < 2; ++i) half[i] = half[i] + other.half[i];
    return *this;
  }
};

inline WideVec operator-(const WideVec& a, const WideVec& b) { return {{a.half[0] - b.half[0], a.half[1] - b.half[1]}}; }
inline WideVec operator*(const WideVec& a, const WideVec& b) { return {{a.half[0] * b.half[0], a.half[1] * b.half[1]}}; }

// Pairwise, the same on every machine with these lanes.
inline double sum(const WideVec& values) {
  double lanes[kHalf];
  (values.half[0] + values.half[1]).store(lanes);
  for (int64_t width = kHalf / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline WideVec widened(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return {{_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))}};
#elif defined(CPU_CAPABILITY_AVX2)
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}};
#elif defined(__aarch64__)
  return {{vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x)}};
#else
  float floats[kLanes];
  double doubles[kLanes];
  x.store(floats);
  for (int64_t i = 0; i < kLanes; ++i) doubles[i] = floats[i];
  return {{Doubles::loadu(doubles), Doubles::loadu(doubles + kHalf)}};
#endif
}

inline Vec rounded(const WideVec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.half[0])), _mm512_cvtpd_ps(x.half[1]), 1);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(x.half[0])), _mm256_cvtpd_ps(x.half[1]), 1);
#elif defined(__aarch64__)
  return vcvt_high_f32_f64(vcvt_f32_f64(x.half[0]), x.half[1]);
#else
  float floats[kLanes];
  double doubles[kLanes];
  x.half[0].store(doubles);
  x.half[1].store(doubles + kHalf);
  for (int64_t i = 0; i < kLanes; ++i) floats[i] = static_cast<float>(doubles[i]);
  return Vec::loadu(floats);
#endif
}

inline double sum(const Vec& values) { return sum(widened(values)); }

// Of one half, the lanes of `where` that belong to it.
inline Doubles select(const Lanes& where, int half, const Doubles& yes, const Doubles& no) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_mov_pd(no, static_cast<__mmask8>(where.bits >> (half * kHalf)), yes);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bits = _mm_castps_si128(half ? _mm256_extractf128_ps(where.bits, 1) : _mm256_castps256_ps128(where.bits));
  return _mm256_blendv_pd(no, yes, _mm256_castsi256_pd(_mm256_cvtepi32_epi64(bits)));
#elif defined(__aarch64__)
  const int32x4_t bits = vreinterpretq_s32_f32(where.bits);
  return vbslq_f64(vreinterpretq_u64_s64(half ? vmovl_high_s32(bits) : vmovl_s32(vget_low_s32(bits))), yes, no);
#else
  float bits[kLanes];
  double a[kHalf], b[kHalf];
  where.bits.store(bits);
  yes.store(a);
  no.store(b);
  for (int64_t i = 0; i < kHalf; ++i) b[i] = std::bit_cast<uint32_t>(bits[half * kHalf + i]) ? a[i] : b[i];
  return Doubles::loadu(b);
#endif
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
