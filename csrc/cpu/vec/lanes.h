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

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
