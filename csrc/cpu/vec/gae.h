// What GAE alone asks of vectors: lanes moved together and apart, and results written past the caches.
#pragma once

#include "cpu/vec/doubles.h"
#include "cpu/vec/lanes.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

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

// A whole vector past the caches, to an address that is a multiple of its size: what is not read again soon need not be
// read before it is overwritten, nor push out what is. Seen by other threads after stored_past_caches().
inline void store_past_caches(float* to, const Vec& values) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_ps(to, values);
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_ps(to, values);
#else
  values.store(to);
#endif
}

inline void stored_past_caches() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
