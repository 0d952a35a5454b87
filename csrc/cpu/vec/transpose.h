// A square of lanes, transposed.
#pragma once

#include "cpu/vec/lanes.h"

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

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
