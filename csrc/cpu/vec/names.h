// The names in which csrc/include writes its formulas, found through the argument's namespace.
#pragma once

#include "cpu/vec/lanes.h"
#include "rlhf_kernels/math.h"

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
inline Vectorized<float> nearest_integer(const Vectorized<float>& x) {
#if defined(__aarch64__)
  return vrndnq_f32(x);  // at::vec's own goes lane by lane
#else
  return x.round();
#endif
}
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
  const auto n = nearest_integer(x);
  return rlhf_kernels::cpu::exp2(n, x - n);
}
inline Vectorized<float> power_of_e(const Vectorized<float>& x) {
  const Vectorized<float> log2_e(1.44269504f), rest(1.92596303e-8f);  // log2(e) in two parts
  const auto n = nearest_integer(x * log2_e);
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
#elif defined(__aarch64__)
  return vfmaq_f32(vnegq_f32(product), a, b);  // fmsub's exact difference would be −0
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
