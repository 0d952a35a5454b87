// What the ranking loss alone asks of vectors: comparisons, signs and counts lane by lane, and exact sums.
#pragma once

#include "cpu/vec/lanes.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

// The first count of a vector, each as the nearest float; the rest is 0.
inline Vec load_integers(const int64_t* from, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto floats = [](__mmask8 mask, const int64_t* at) {
    return _mm512_cvtepi64_ps(_mm512_maskz_loadu_epi64(mask, at));
  };
  const uint32_t mask = (1u << count) - 1;
  return _mm512_insertf32x8(_mm512_castps256_ps512(floats(static_cast<__mmask8>(mask), from)),
                            floats(static_cast<__mmask8>(mask >> 8), from + 8), 1);
#else
  // Lane by lane: no other instruction set turns a vector of such integers into floats in one rounding.
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(from[i]);
  return Vec::loadu(values);
#endif
}

// Also where one of them is NaN.
inline Lanes not_less(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return {_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ)};
#else
  return {(a < b) ^ Vec(std::bit_cast<float>(-1))};
#endif
}

// Not where one of them is NaN.
inline Lanes different(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return {_mm512_cmp_ps_mask(a, b, _CMP_NEQ_OQ)};
#else
  return {(a > b) | (b > a)};
#endif
}

// 1 where x is positive, −1 where it is negative, else 0: for NaN too.
inline Vec signum(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  // What each class of numbers becomes, in four bits, from NaN on: 0 is 8, −1 is 9 and 1 is 10.
  constexpr int becomes = 0xa9a9'a888;
  return _mm512_fixupimm_ps(x, x, _mm512_set1_epi32(becomes), 0);
#else
  const Vec zero(0.0f), one(1.0f);
  return ((x > zero) & one) - ((zero > x) & one);
#endif
}

// −x where sign is negative, and x in the other lanes.
inline Vec flipped(const Vec& sign, const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int xor_of_and = 0x78;
  const auto bits = [](const Vec& values) { return _mm512_castps_si512(values); };
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits(x), bits(sign), bits(Vec(-0.0f)), xor_of_and));
#else
  return x ^ (sign & Vec(-0.0f));
#endif
}

// How often each lane was in a set: integers, which any of a processor's units can add.
struct Tally {
#if defined(CPU_CAPABILITY_AVX512)
  __m512i counts = _mm512_setzero_si512();

  void add(const Lanes& where) { counts = _mm512_mask_add_epi32(counts, where.bits, counts, _mm512_set1_epi32(1)); }
  Vec value() const { return _mm512_cvtepi32_ps(counts); }
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i counts = _mm256_setzero_si256();

  void add(const Lanes& where) { counts = _mm256_sub_epi32(counts, _mm256_castps_si256(where.bits)); }
  Vec value() const { return _mm256_cvtepi32_ps(counts); }
#elif defined(__aarch64__)
  int32x4_t counts = vdupq_n_s32(0);

  void add(const Lanes& where) { counts = vsubq_s32(counts, vreinterpretq_s32_f32(where.bits)); }
  Vec value() const { return vcvtq_f32_s32(counts); }
#else
  Vec counts{0.0f};

  void add(const Lanes& where) { counts = counts + (where.bits & Vec(1.0f)); }
  Vec value() const { return counts; }
#endif
};

// A sum of terms of at most 1, as exact as a compensated one (Kahan 1965), without each addition waiting for the error of
// the one before. Every term is split in two: a high part, a multiple of one power of two so coarse that these sums are
// exact, and the small rest.
struct SplitSum {
  Vec high{0.0f}, low{0.0f};

  SplitSum() = default;
  SplitSum(const Vec& term, const Vec& grid) : high((term + grid) - grid), low(term - high) {}

  // With N the number of terms rounded up to a power of two (at least 4), floats just below N are 2^-24·N apart. So
  // (term + 0.75·N) − 0.75·N rounds the term to a multiple of that, and N such terms of at most 1 are summed exactly.
  static Vec grid_for(int64_t terms) {
    return Vec(0.75f * static_cast<float>(std::bit_ceil(static_cast<uint64_t>(terms < 4 ? 4 : terms))));
  }

  void operator+=(const SplitSum& term) {
    high = high + term.high;
    low = low + term.low;
  }
  void operator-=(const SplitSum& term) {
    high = high - term.high;
    low = low - term.low;
  }
  // By a factor, and what that lost to rounding.
  Vec times(const Vec& factor, const Vec& lost) const { return fma(high, factor, fma(high, lost, low * factor)); }
};

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
