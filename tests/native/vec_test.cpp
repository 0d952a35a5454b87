// The vectors of csrc/cpu/vec against plain floats, lane by lane, on whatever may stand in a lane. Built once per
// instruction set, as the kernels are.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/vec.h"
#include "cpu/vec/gae.h"
#include "cpu/vec/ranking_loss.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kLargest = std::numeric_limits<float>::max();
const float kValues[] = {0.0f, -0.0f, 1.0f, -1.0f, 0.5f, 1.5f, 2.5f, -2.5f, 3.14159f, 1e-40f, -1e-45f, 1.1754944e-38f,
                         5.9604645e-8f, 65504.0f, 65520.0f, 1e38f, kLargest, -kLargest, kInfinity, -kInfinity, NAN, -NAN,
                         1.00390625f, 1.01171875f};  // the last two halfway between two bfloat16
std::mt19937_64 generator(0);
int failures = 0;

float any_float() {
  switch (generator() % 4) {
    case 0:
      return kValues[generator() % std::size(kValues)];
    case 1:
      return std::bit_cast<float>(static_cast<uint32_t>(generator()));
    default:
      return static_cast<float>(std::normal_distribution<double>()(generator));
  }
}

void expect(bool holds, const char* what, double got, double want) {
  if (holds) return;
  if (++failures < 50) std::printf("%s: is %.9g, must be %.9g\n", what, got, want);
}

// The same number, sign of 0 included, or both none.
template <class T>
void expect_same(T got, T want, const char* what) {
  const bool none = got != got && want != want;
  expect(none || (got == want && std::signbit(got) == std::signbit(want)), what, got, want);
}

void expect_within(float got, double want, double ulps, const char* what) {
  const float size = std::fabs(static_cast<float>(want));
  expect(std::fabs(got - want) <= ulps * (std::nextafter(size, kInfinity) - size), what, got, want);
}

struct Numbers {
  float lane[kLanes];

  Numbers() {
    for (float& x : lane) x = any_float();
  }
  Numbers(const Vec& x) { x.store(lane); }
  Vec vec() const { return Vec::loadu(lane); }
};

template <class Function>
void expect_lanes(const Vec& got, const char* what, Function&& want) {
  const Numbers found(got);
  for (int i = 0; i < kLanes; ++i) expect_same(found.lane[i], static_cast<float>(want(i)), what);
}

void lanes() {
  const Numbers x, y, z;
  const auto &a = x.lane, &b = y.lane, &c = z.lane;
  const Vec va = x.vec(), vb = y.vec(), vc = z.vec();
  expect_lanes(larger(va, vb), "larger", [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
  expect_lanes(smaller(va, vb), "smaller", [&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
  expect_lanes(signum(va), "signum", [&](int i) { return a[i] > 0 ? 1 : a[i] < 0 ? -1 : 0; });
  float top = a[0];
  for (const float lane : a) top = lane > top || lane != lane ? lane : top;
  expect(largest(va) == top || top != top, "largest", largest(va), top);
  expect(std::isnan(largest(va)) == std::isnan(top), "largest, NaN", largest(va), top);

  const auto expect_set = [&](const Lanes& where, const char* what, auto&& in) {
    int64_t members = 0;
    for (int i = 0; i < kLanes; ++i) members += in(i);
    expect(count(where) == members, what, count(where), members);
    expect_lanes(kept(where, vc), what, [&](int i) { return in(i) ? c[i] : 0; });
    expect_lanes(select(where, vb, vc), what, [&](int i) { return in(i) ? b[i] : c[i]; });
    // With 0 added −0 is 0, which it may be already.
    expect_lanes(add_where(where, vb, vc) + Vec(0.0f), what, [&](int i) { return (in(i) ? b[i] + c[i] : b[i]) + 0.0f; });
    Tally tally;
    for (int n = 0; n < 3; ++n) tally.add(where);
    expect_lanes(tally.value(), what, [&](int i) { return in(i) ? 3 : 0; });
    const WideVec wide_b = widened(vb), wide_c = widened(vc);
    for (int half = 0; half < 2; ++half) {
      double found[kHalf];
      select(where, half, wide_b.half[half], wide_c.half[half]).store(found);
      for (int i = 0; i < kHalf; ++i) {
        const int lane = static_cast<int>(half * kHalf) + i;
        expect_same<double>(found[i], in(lane) ? b[lane] : c[lane], what);
      }
    }
  };
  expect_set(greater(va, vb), "greater", [&](int i) { return a[i] > b[i]; });
  expect_set(not_less(va, vb), "not_less", [&](int i) { return !(a[i] < b[i]); });
  expect_set(different(va, vb), "different", [&](int i) { return a[i] < b[i] || a[i] > b[i]; });
  for (int64_t n = 0; n <= kLanes; ++n) expect_set(first_lanes(n), "first_lanes", [&](int i) { return i < n; });

  uint8_t bytes[kLanes];
  for (uint8_t& byte : bytes) byte = generator() % 2 ? static_cast<uint8_t>(generator()) : 0;
  for (int64_t n = 0; n <= kLanes; ++n) {
    expect_set(lanes_of(bytes, n), "lanes_of", [&](int i) { return i < n && bytes[i]; });
  }
}

// x86's baseline cannot multiply and add in one rounding, which costs e^x of a large x some digits.
#if defined(CPU_CAPABILITY_DEFAULT) && !defined(__aarch64__)
constexpr double kUlpsOfE = 64;
#else
constexpr double kUlpsOfE = 2;
#endif

void formulas() {
  const Numbers x, y;
  const auto &a = x.lane, &b = y.lane;
  const Vec va = x.vec(), vb = y.vec();
  expect_lanes(at_most(va, vb), "at_most", [&](int i) { return a[i] > b[i] ? b[i] : a[i]; });
  expect_lanes(at_least(va, vb), "at_least", [&](int i) { return a[i] < b[i] ? b[i] : a[i]; });
  expect_lanes(nearest_integer(va), "nearest_integer", [&](int i) { return std::nearbyint(a[i]); });
  expect_lanes(minus_absolute(va), "minus_absolute", [&](int i) { return -std::fabs(a[i]); });
  expect_lanes(flipped(va, vb), "flipped", [&](int i) { return std::signbit(a[i]) ? -b[i] : b[i]; });
  expect_lanes(where_greater(va, vb, va, Vec(2.0f)), "where_greater", [&](int i) { return a[i] > b[i] ? a[i] : 2; });
  const Numbers lost(lost_by_product(va, vb, va * vb)), product(va * vb);
  const Numbers power(power_of_two(smaller(Vec(127.0f), larger(Vec(-149.0f), va))));
  const Numbers of_e(power_of_e(smaller(Vec(0.0f), larger(Vec(-104.0f), va)))), inverse(reciprocal(va));
  for (int i = 0; i < kLanes; ++i) {
    // Where a float holds what was lost. Whether nothing is 0 or −0 is nobody's concern.
    if (std::fabs(product.lane[i]) > 1e-30f && std::fabs(product.lane[i]) < kLargest) {
      const double want = double{a[i]} * double{b[i]} - double{product.lane[i]};
      expect(lost.lane[i] == want, "lost_by_product", lost.lane[i], want);
    }
    if (a[i] != a[i]) continue;
    const double bounded = std::fmin(127, std::fmax(-149, double{a[i]}));
    expect_within(power.lane[i], std::exp2(bounded), 1.5, "power_of_two");
    expect_within(of_e.lane[i], std::exp(std::fmin(0, std::fmax(-104, double{a[i]}))), kUlpsOfE, "power_of_e");
    if (std::fabs(a[i]) > 1e-30f && std::fabs(a[i]) < 1e30f) expect_within(inverse.lane[i], 1.0 / a[i], 1.5, "reciprocal");
  }
}

void powers() {
  for (int n = -150; n <= 127; ++n) {
    Numbers p;
    for (float& lane : p.lane) lane = 0.7f + 0.7f * static_cast<float>(generator() >> 40) / (1 << 24);
    expect_lanes(scaled_by_power(p.vec(), Vec(static_cast<float>(n))), "scaled_by_power",
                 [&](int i) { return std::ldexp(p.lane[i], n); });
  }
}

template <class T>
void memory(const char* what) {
  T from[kLanes], to[kLanes + 1];
  for (T& value : from) value = static_cast<T>(any_float());
  const Numbers values;
  for (int64_t n = 0; n <= kLanes; ++n) {
    expect_lanes(load_lanes(from, n), what, [&](int i) { return i < n ? static_cast<float>(from[i]) : 0; });
    expect_lanes(load_lanes_or(from, n, -1.0f), what, [&](int i) { return i < n ? static_cast<float>(from[i]) : -1; });
    for (T& value : to) value = static_cast<T>(7.0f);
    store_lanes(to, values.vec(), n);
    for (int64_t i = 0; i <= kLanes; ++i) {
      const T want = i < n ? static_cast<T>(values.lane[i]) : static_cast<T>(7.0f);
      expect_same(static_cast<float>(to[i]), static_cast<float>(want), what);
    }
  }
}

void integers() {
  int64_t from[kLanes];
  for (int64_t& value : from) value = static_cast<int64_t>(generator()) >> (generator() % 64);
  for (int64_t n = 0; n <= kLanes; ++n) {
    expect_lanes(load_integers(from, n), "load_integers", [&](int i) { return i < n ? static_cast<float>(from[i]) : 0.0f; });
  }
}

void doubles() {
  const Numbers x, y;
  const WideVec wide = widened(x.vec()), behind = widened(y.vec());
  expect_lanes(rounded(wide), "widened and rounded", [&](int i) { return x.lane[i]; });
  double all[kLanes], next[kLanes + 1], found[kHalf];
  for (int i = 0; i < kLanes; ++i) all[i] = std::normal_distribution<double>()(generator);
  const WideVec some{{Doubles::loadu(all), Doubles::loadu(all + kHalf)}};
  expect_lanes(rounded(some), "rounded", [&](int i) { return static_cast<float>(all[i]); });
  for (int half = 0; half < 2; ++half) {
    wide.half[half].store(next);
    behind.half[half].store(next + kHalf);
    for (int i = 0; i < kHalf; ++i) expect_same<double>(next[i], x.lane[half * kHalf + i], "widened");
    lowered<1>(wide.half[half], behind.half[half]).store(found);
    for (int i = 0; i < kHalf; ++i) expect_same(found[i], next[i + 1], "lowered");
    if constexpr (kHalf > 2) {
      lowered<2>(wide.half[half], behind.half[half]).store(found);
      for (int i = 0; i < kHalf; ++i) expect_same(found[i], next[i + 2], "lowered by two");
    }
    first_everywhere(wide.half[half]).store(found);
    for (const double lane : found) expect_same(lane, next[0], "first_everywhere of doubles");
  }
  expect_lanes(first_everywhere(x.vec()), "first_everywhere", [&](int) { return x.lane[0]; });
}

void moves() {
  const Numbers x;
  for (int set = 0; set < 1 << kLanes; ++set) {
    uint8_t bytes[kLanes];
    std::vector<float> members;
    for (int i = 0; i < kLanes; ++i) {
      bytes[i] = set >> i & 1;
      if (bytes[i]) members.push_back(x.lane[i]);
    }
    const Lanes where = lanes_of(bytes);
    expect_lanes(compressed(where, x.vec(), Vec(-1.0f)), "compressed",
                 [&](size_t i) { return i < members.size() ? members[i] : -1; });
    int next = 0;
    expect_lanes(expanded(where, x.vec()), "expanded", [&](int i) { return bytes[i] ? x.lane[next++] : 0; });
  }
  Numbers rows[kLanes];
  Vec square[kLanes];
  for (int i = 0; i < kLanes; ++i) square[i] = rows[i].vec();
  transpose(square, square);
  for (int j = 0; j < kLanes; ++j) expect_lanes(square[j], "transpose", [&](int i) { return rows[i].lane[j]; });
}

bool runs_here() {
#if defined(CPU_CAPABILITY_AVX512)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#elif defined(CPU_CAPABILITY_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return true;
#endif
}

int run() {
  for (int trial = 0; trial < 3000; ++trial) {
    lanes();
    formulas();
    memory<float>("float32");
    memory<c10::BFloat16>("bfloat16");
    memory<c10::Half>("float16");
    integers();
    doubles();
  }
  powers();
  moves();
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu

int main() {
  constexpr int skipped = 77;  // CMakeLists.txt says so to ctest
  return rlhf_kernels::cpu::runs_here() ? rlhf_kernels::cpu::run() : skipped;
}
