// Values moved from lane to lane.
#pragma once

#include "cpu/vec/doubles.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

// Rows of a square of lanes to its columns, which may be written over the rows.
[[gnu::always_inline]] inline void transpose(const Vec* rows, Vec* columns) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // b[4·g + c]: column c of each 128-bit lane, over the four rows of group g.
  for (int g = 0; g < 16; g += 4) {
    const auto pd = [&](int i) { return _mm512_castps_pd(a[g + i]); };
    b[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(0), pd(2)));
    b[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(0), pd(2)));
    b[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(1), pd(3)));
    b[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(1), pd(3)));
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    columns[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    columns[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    columns[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    columns[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int g = 0; g < 8; g += 4) {
    b[g] = _mm256_shuffle_ps(a[g], a[g + 2], 0x44);
    b[g + 1] = _mm256_shuffle_ps(a[g], a[g + 2], 0xee);
    b[g + 2] = _mm256_shuffle_ps(a[g + 1], a[g + 3], 0x44);
    b[g + 3] = _mm256_shuffle_ps(a[g + 1], a[g + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    columns[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    columns[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
#elif defined(__aarch64__)
  // Of the pairs of rows the even columns, and the odd ones.
  const auto pairs = [&](int i) { return vreinterpretq_f64_f32(vtrn1q_f32(rows[i], rows[i + 1])); };
  const auto odd_pairs = [&](int i) { return vreinterpretq_f64_f32(vtrn2q_f32(rows[i], rows[i + 1])); };
  const float64x2_t even[] = {pairs(0), pairs(2)}, odd[] = {odd_pairs(0), odd_pairs(2)};
  columns[0] = vreinterpretq_f32_f64(vtrn1q_f64(even[0], even[1]));
  columns[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd[0], odd[1]));
  columns[2] = vreinterpretq_f32_f64(vtrn2q_f64(even[0], even[1]));
  columns[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd[0], odd[1]));
#else
  float square[kLanes][kLanes];
  for (int64_t i = 0; i < kLanes; ++i) rows[i].store(square[i]);
  for (int64_t i = 0; i < kLanes; ++i) {
    float column[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) column[j] = square[j][i];
    columns[i] = Vec::loadu(column);
  }
#endif
}

inline Lanes first_lanes(int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  return {static_cast<__mmask16>((1u << count) - 1)};
#else
  return {Vec(static_cast<float>(count)) > Vec::arange(0.0f, 1.0f)};
#endif
}

#if !defined(CPU_CAPABILITY_AVX512)
#if defined(__aarch64__)
constexpr uint8_t kMoved = sizeof(float);  // what is moved are the bytes of a lane, each by itself
#else
constexpr uint8_t kMoved = 1;
#endif
using Sources = uint8_t[kLanes * kMoved];

// For every set of lanes, where each lane is to take its value from: to move these together, and apart again.
struct Moves {
  Sources together[1 << kLanes] = {}, apart[1 << kLanes] = {};

  constexpr Moves() {
    for (int set = 0; set < 1 << kLanes; ++set) {
      uint8_t found = 0;
      for (uint8_t lane = 0; lane < kLanes; ++lane) {
        point(apart[set], lane, found % kLanes);
        if (set >> lane & 1) point(together[set], found++, lane);
      }
    }
  }

 private:
  static constexpr void point(Sources& sources, uint8_t lane, uint8_t source) {
    for (uint8_t i = 0; i < kMoved; ++i) sources[lane * kMoved + i] = static_cast<uint8_t>(source * kMoved + i);
  }
};
inline constexpr Moves kMoves;

inline Vec moved(const Vec& x, const Sources& sources) {
#if defined(CPU_CAPABILITY_AVX2)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(sources));
  return _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(bytes));
#elif defined(__aarch64__)
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), vld1q_u8(sources)));
#else
  float from[kLanes], to[kLanes];
  x.store(from);
  for (int64_t i = 0; i < kLanes; ++i) to[i] = from[sources[i]];
  return Vec::loadu(to);
#endif
}

inline int set_of(const Lanes& where) {
#if defined(CPU_CAPABILITY_AVX2)
  return _mm256_movemask_ps(where.bits);
#elif defined(__aarch64__)
  constexpr uint32_t members[kLanes] = {1, 2, 4, 8};
  return static_cast<int>(vaddvq_u32(vandq_u32(vreinterpretq_u32_f32(where.bits), vld1q_u32(members))));
#else
  float bits[kLanes];
  where.bits.store(bits);
  int set = 0;
  for (int i = 0; i < kLanes; ++i) set |= (std::bit_cast<uint32_t>(bits[i]) != 0) << i;
  return set;
#endif
}
#endif

// The lanes of `where` moved together, and fill behind them.
inline Vec compressed(const Lanes& where, const Vec& x, const Vec& fill) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_compress_ps(fill, where.bits, x);
#else
  return select(first_lanes(count(where)), moved(x, kMoves.together[set_of(where)]), fill);
#endif
}

// The other way round, and 0 in the other lanes.
inline Vec expanded(const Lanes& where, const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_expand_ps(where.bits, x);
#else
  return kept(where, moved(x, kMoves.apart[set_of(where)]));
#endif
}

// In each lane what is kCount lanes further, in x and then in `behind`.
template <int64_t kCount>
inline Doubles lowered(const Doubles& x, const Doubles& behind) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(behind), _mm512_castpd_si512(x), kCount));
#elif defined(CPU_CAPABILITY_AVX2)
  static_assert(kCount == 1 || kCount == 2);
  const __m256d middle = _mm256_permute2f128_pd(x, behind, 0x21);
  return kCount == 2 ? middle : _mm256_shuffle_pd(x, middle, 0x5);
#elif defined(__aarch64__)
  static_assert(kCount == 1);
  return vextq_f64(x, behind, kCount);
#else
  double values[2 * kHalf];
  x.store(values);
  behind.store(values + kHalf);
  return Doubles::loadu(values + kCount);
#endif
}

inline Vec first_everywhere(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_broadcastss_ps(_mm512_castps512_ps128(x));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_broadcastss_ps(_mm256_castps256_ps128(x));
#elif defined(__aarch64__)
  return vdupq_laneq_f32(x, 0);
#else
  float values[kLanes];
  x.store(values);
  return Vec(values[0]);
#endif
}

inline Doubles first_everywhere(const Doubles& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_broadcastsd_pd(_mm512_castpd512_pd128(x));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_broadcastsd_pd(_mm256_castpd256_pd128(x));
#elif defined(__aarch64__)
  return vdupq_laneq_f64(x, 0);
#else
  double values[kHalf];
  x.store(values);
  return Doubles(values[0]);
#endif
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
