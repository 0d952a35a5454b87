// Vectors of float, arithmetic on them, and sets of their lanes.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <bit>
#include <cstdint>

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { return at::vec::fmadd(a, b, c); }

// NaN in the second argument stays: the order of the operands matters below.
inline Vec larger(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return Vec::blendv(b, a, a > b);
#endif
}

inline Vec smaller(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(a, b);
#else
  return Vec::blendv(b, a, a < b);
#endif
}

// p·2^n for an integral n.
inline Vec scaled_by_power(const Vec& p, const Vec& n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#elif defined(CPU_CAPABILITY_AVX2)
  // Two factors, each a normal number: 2^n alone leaves float32's range where the product does not.
  const __m256i exponent = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  const auto power = [](__m256i k) {
    return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23)));
  };
  return p * power(half) * power(_mm256_sub_epi32(exponent, half));
#elif defined(__aarch64__)
  const int32x4_t exponent = vcvtq_s32_f32(n), half = vshrq_n_s32(exponent, 1);  // two factors here too
  const auto power = [](int32x4_t k) {
    return Vec(vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23)));
  };
  return p * power(half) * power(vsubq_s32(exponent, half));
#else
  float values[kLanes], powers[kLanes];
  p.store(values);
  n.store(powers);
  for (int64_t i = 0; i < kLanes; ++i) {  // two factors here too
    const float power = powers[i] == powers[i] ? powers[i] : 0.0f;  // NaN has no integer, and is in p as well
    const uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(power) + 256), half = exponent >> 1;
    values[i] *= std::bit_cast<float>((half - 1) << 23);
    values[i] *= std::bit_cast<float>((exponent - half - 1) << 23);
  }
  return Vec::loadu(values);
#endif
}

// 2^(n + f) for an integral n below 128 and f in [−½, ½], to about 1 ulp: a shorter way than exponential, for the loops
// that are all exponentials. The polynomial is the least-squares fit to the relative error, reweighted until its peaks were
// level (2e-9).
inline Vec exp2(const Vec& n, const Vec& f) {
  Vec p(1.5353361959569156e-4f);
  p = fma(p, f, Vec(1.3398875016719103e-3f));
  p = fma(p, f, Vec(9.61843691766262e-3f));
  p = fma(p, f, Vec(5.5503323674201965e-2f));
  p = fma(p, f, Vec(0.24022647738456726f));
  p = fma(p, f, Vec(0.6931471824645996f));
  p = fma(p, f, Vec(1.0f));
  return scaled_by_power(p, n);
}

// A sum of terms of at most 1, as exact as a compensated one (Kahan 1965), without each addition waiting for the error of
// the one before. Every term is split in two: a high part, a multiple of one power of two so coarse that these sums are
// exact, and the small rest.
struct SplitSum {
  Vec high{0.0f}, low{0.0f};

  SplitSum() = default;
  SplitSum(const Vec& term, const Vec& grid) : high((term + grid) - grid), low(term - high) {}

  // Adding this number to a term and subtracting it again leaves the high part: a multiple of 2^-24 times the number of
  // terms, rounded up to a power of two.
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

inline float largest(const Vec& values) {
#if defined(__aarch64__)
  return vmaxvq_f32(values);
#else
  float lanes[kLanes];
  values.store(lanes);
  float result = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) result = result < lanes[i] || lanes[i] != lanes[i] ? lanes[i] : result;
  return result;
#endif
}

// Which lanes something holds for: a mask register, where the instruction set has them.
struct Lanes {
#if defined(CPU_CAPABILITY_AVX512)
  __mmask16 bits;
#else
  Vec bits;  // all ones, or zeros
#endif
};

inline Lanes greater(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return {_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)};
#else
  return {a > b};
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

inline int64_t count(const Lanes& where) {
#if defined(CPU_CAPABILITY_AVX512)
  return std::popcount(static_cast<uint32_t>(where.bits));
#elif defined(CPU_CAPABILITY_AVX2)
  return std::popcount(static_cast<uint32_t>(_mm256_movemask_ps(where.bits)));
#elif defined(__aarch64__)
  return -vaddvq_s32(vreinterpretq_s32_f32(where.bits));
#else
  float bits[kLanes];
  where.bits.store(bits);
  int64_t result = 0;
  for (const float lane : bits) result += std::bit_cast<uint32_t>(lane) != 0;
  return result;
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

// x, and 0 in the other lanes whatever x is there.
inline Vec kept(const Lanes& where, const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_mov_ps(where.bits, x);
#else
  return x & where.bits;
#endif
}

inline Vec select(const Lanes& where, const Vec& yes, const Vec& no) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_mov_ps(no, where.bits, yes);
#else
  return Vec::blendv(no, yes, where.bits);
#endif
}

inline Vec add_where(const Lanes& where, const Vec& total, const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_add_ps(total, where.bits, total, x);
#else
  return total + kept(where, x);
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

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
