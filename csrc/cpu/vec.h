// Vectors of float for one instruction set: torch's own (at::vec), what they lack, and the names csrc/include uses.
// Only for translation units that are built once per instruction set; RLHF_ISA names it.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <bit>
#include <cstdint>

#include "cpu/kernels.h"
#include "rlhf_kernels/math.h"

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
#endif
    }
    float values[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(from[i]);
    return Vec::loadu(values);
  }
}

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
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(from[i]);
  return Vec::loadu(values);
#endif
}

// The first count of a vector, and fill in the other lanes.
template <class T>
inline Vec load_lanes_or(const T* from, int64_t count, float fill) {
  const Vec values = load_lanes(from, count);
  return count == kLanes ? values : Vec::set(Vec(fill), values, count);
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
#endif
    float buffer[kLanes];
    values.store(buffer);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(buffer[i]);
  }
}

// A sum of terms of at most 1, as exact as a compensated one (Kahan 1965), but no term waits for what the one before it
// lost. High parts are multiples of one power of two, coarse enough for their sums to be exact.
struct SplitSum {
  Vec high{0.0f}, low{0.0f};

  SplitSum() = default;
  SplitSum(const Vec& term, const Vec& grid) : high((term + grid) - grid), low(term - high) {}

  // What leaves, added and subtracted again, multiples of 2^-24 times the number of terms, that rounded up to a power of two.
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
  float lanes[kLanes];
  values.store(lanes);
  float result = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) result = result < lanes[i] || lanes[i] != lanes[i] ? lanes[i] : result;
  return result;
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
#else
  Vec counts{0.0f};

  void add(const Lanes& where) { counts = counts + (where.bits & Vec(1.0f)); }
  Vec value() const { return counts; }
#endif
};

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
#endif
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = wanted[i] ? 1.0f : 0.0f;
  return {Vec::loadu(values) > Vec(0.0f)};
#endif
}

// The two halves of a vector in double precision.
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

inline Lanes first_lanes(int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  return {static_cast<__mmask16>((1u << count) - 1)};
#else
  return {Vec(static_cast<float>(count)) > Vec::arange(0.0f, 1.0f)};
#endif
}

#if !defined(CPU_CAPABILITY_AVX512)
// For every set of lanes, where each lane is to take its value from: to move these together, and apart again.
struct Moves {
  uint8_t together[1 << kLanes][kLanes] = {}, apart[1 << kLanes][kLanes] = {};

  constexpr Moves() {
    for (int set = 0; set < 1 << kLanes; ++set) {
      uint8_t found = 0;
      for (uint8_t lane = 0; lane < kLanes; ++lane) {
        apart[set][lane] = found % kLanes;
        if (set >> lane & 1) together[set][found++] = lane;
      }
    }
  }
};
inline constexpr Moves kMoves;

inline Vec moved(const Vec& x, const uint8_t (&sources)[kLanes]) {
#if defined(CPU_CAPABILITY_AVX2)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(sources));
  return _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(bytes));
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
#else
  double values[kHalf];
  x.store(values);
  return Doubles(values[0]);
#endif
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu

// The names in which csrc/include writes its formulas, found through the argument's namespace.
namespace at::vec {
inline namespace CPU_CAPABILITY {

inline Vectorized<float> where_greater(const Vectorized<float>& a, const Vectorized<float>& b,
                                       const Vectorized<float>& yes, const Vectorized<float>& no) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
#else
  return Vectorized<float>::blendv(no, yes, a > b);
#endif
}
inline Vectorized<float> at_most(const Vectorized<float>& x, const Vectorized<float>& limit) {
  return rlhf_kernels::cpu::smaller(limit, x);
}
inline Vectorized<float> at_least(const Vectorized<float>& x, const Vectorized<float>& limit) {
  return rlhf_kernels::cpu::larger(limit, x);
}
inline Vectorized<float> absolute(const Vectorized<float>& x) { return x.abs(); }
inline Vectorized<float> minus_absolute(const Vectorized<float>& x) { return x | Vectorized<float>(-0.0f); }
inline Vectorized<float> nearest_integer(const Vectorized<float>& x) { return x.round(); }
inline Vectorized<float> times_power_of_two(const Vectorized<float>& x, const Vectorized<float>& n) {
  return rlhf_kernels::cpu::scaled_by_power(x, n);
}
// Of numbers far from 0 and infinity, to about 1 ulp.
inline Vectorized<float> reciprocal(const Vectorized<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 rough = _mm512_rcp14_ps(x);  // then one step of Newton's method, a third of a division's time
  return _mm512_fmadd_ps(rough, _mm512_fnmadd_ps(x, rough, _mm512_set1_ps(1.0f)), rough);
#else
  return Vectorized<float>(1.0f) / x;
#endif
}
inline Vectorized<float> power_of_two(const Vectorized<float>& x) {
  const auto n = x.round();
  return rlhf_kernels::cpu::exp2(n, x - n);
}
inline Vectorized<float> power_of_e(const Vectorized<float>& x) {
  const Vectorized<float> log2_e(1.44269504f), rest(1.92596303e-8f);  // log2(e) in two parts
  const auto n = (x * log2_e).round();
  return rlhf_kernels::cpu::exp2(n, fmadd(x, rest, fmsub(x, log2_e, n)));
}
inline Vectorized<float> multiply_add(const Vectorized<float>& a, const Vectorized<float>& b,
                                      const Vectorized<float>& c) {
  return rlhf_kernels::cpu::fma(a, b, c);
}
inline Vectorized<double> multiply_add(const Vectorized<double>& a, const Vectorized<double>& b,
                                       const Vectorized<double>& c) {
  return fmadd(a, b, c);
}
inline Vectorized<float> lost_by_product(const Vectorized<float>& a, const Vectorized<float>& b,
                                         const Vectorized<float>& product) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return fmsub(a, b, product);
#else
  // Where that would round the product, a double holds it.
  constexpr int lanes = Vectorized<float>::size();
  float x[lanes], y[lanes], z[lanes];
  a.store(x);
  b.store(y);
  product.store(z);
  for (int i = 0; i < lanes; ++i) {
    z[i] = static_cast<float>(static_cast<double>(x[i]) * static_cast<double>(y[i]) - static_cast<double>(z[i]));
  }
  return Vectorized<float>::loadu(z);
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace at::vec
