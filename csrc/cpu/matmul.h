// A matrix product for the output projection, in the manner of Van Zee and van de Geijn 2015 (BLIS): panels of both
// operands packed in the order they are read, and one small kernel that keeps its tile of the result in registers.
//
// A BLAS would do but for three things that the linear ops promise: the sum behind an entry runs over k in one order,
// whatever the number of rows and threads; bfloat16 operands give float32 logits, not bfloat16 ones; and a block of
// logits can be reduced while it is in the cache.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/vec.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRegisterRows = 12, kTileVectors = 2;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kRegisterRows = 6, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kRegisterRows = 6, kTileVectors = 3;
#else
constexpr int kRegisterRows = 4, kTileVectors = 1;
#endif
constexpr int64_t kTileColumns = kTileVectors * kLanes;
// k is cut here so that a panel of each operand stays in the L1 cache. Part of the result's definition: never tuned at
// run time.
constexpr int64_t kDepthBlock = 256;
constexpr int64_t kChain = 64;
// How many steps of k B is fetched before it is read.
constexpr int64_t kAhead = 8;

// What is multiplied: floats, or pairs of bfloat16 that follow each other along k. k is filled up with zeros to a
// multiple of kDepthMultiple units.
struct Floats {
  using Unit = float;
  static constexpr int64_t kPerUnit = 1, kDepthMultiple = 1, kTileRows = kRegisterRows;
  static Vec broadcast(const float* a) { return Vec(*a); }
  static Vec read(const float* b) { return Vec::loadu(b); }
  static Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) { return fma(a, b, c); }
};

#if defined(__AMX_BF16__)
// Multiplied by the matrix unit: see tiles.h.
struct BfloatPairs {
  using Unit = uint32_t;
  static constexpr int64_t kPerUnit = 2, kDepthMultiple = 16, kTileRows = 32;
};
#elif defined(__AVX512BF16__)
struct BfloatPairs {
  using Unit = uint32_t;
  static constexpr int64_t kPerUnit = 2, kDepthMultiple = 1, kTileRows = kRegisterRows;
  static __m512bh broadcast(const uint32_t* a) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)); }
  static __m512bh read(const uint32_t* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static Vec multiply_add(__m512bh a, __m512bh b, const Vec& c) { return _mm512_dpbf16_ps(c, a, b); }
};
#endif

template <class Math>
int64_t units(int64_t depth) {
  return divide_up(depth, Math::kPerUnit * Math::kDepthMultiple) * Math::kDepthMultiple;
}
template <class Math>
int64_t padded_rows(int64_t rows) {
  return divide_up(rows, Math::kTileRows) * Math::kTileRows;
}
inline int64_t padded_columns(int64_t columns) { return divide_up(columns, kTileColumns) * kTileColumns; }

inline void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                      int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, columns * sizeof(float));
}

// One tile of the result: Rows × kTileColumns, over `depth` units of k. Summed in three levels (kChain, kDepthBlock,
// all of k), none of them long: float32 chains over all of k would lose the digits that eager's matmul keeps.
template <class Math, int Rows>
void tile_kernel(int64_t depth, const typename Math::Unit* a, const typename Math::Unit* b, float* c, int64_t stride,
                 bool accumulate) {
  if (accumulate) {  // what is added to may lie in memory
    for (int i = 0; i < Rows; ++i) {
      for (int64_t j = 0; j < kTileColumns; j += 16) __builtin_prefetch(c + i * stride + j, 1);
    }
  }
  Vec totals[Rows][kTileVectors];
  for (int64_t start = 0; start < depth; start += kChain) {
    Vec sums[Rows][kTileVectors];
    const int64_t steps = std::min(kChain, depth - start);
    for (int64_t k = 0; k < steps; ++k, a += kRegisterRows, b += kTileColumns) {
      // B's panel and A's together are larger than the L1 cache of many processors.
      for (int64_t j = 0; j < kTileColumns; j += 16) __builtin_prefetch(b + kAhead * kTileColumns + j);
      decltype(Math::read(b)) columns[kTileVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) columns[j] = Math::read(b + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const auto row = Math::broadcast(a + i);
#pragma GCC unroll 4
        for (int j = 0; j < kTileVectors; ++j) sums[i][j] = Math::multiply_add(row, columns[j], sums[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) totals[i][j] = totals[i][j] + sums[i][j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) {
      float* to = c + i * stride + j * kLanes;
      (accumulate ? Vec::loadu(to) + totals[i][j] : totals[i][j]).store(to);
    }
  }
}

template <class Math>
using TileKernel = void (*)(int64_t, const typename Math::Unit*, const typename Math::Unit*, float*, int64_t, bool);

// A tile with fewer rows costs less: a handful of rows is what a decoder scores.
template <class Math, int... Rows>
constexpr TileKernel<Math> tile_kernel_of(int rows, std::integer_sequence<int, Rows...>) {
  constexpr TileKernel<Math> table[] = {&tile_kernel<Math, Rows + 1>...};
  return table[rows - 1];
}

template <class Math>
void tile(int64_t depth, const typename Math::Unit* a, const typename Math::Unit* b, float* c, int64_t stride,
          int64_t rows, int64_t columns, bool accumulate) {
  const auto kernel = tile_kernel_of<Math>(static_cast<int>(rows), std::make_integer_sequence<int, kRegisterRows>{});
  if (columns == kTileColumns) return kernel(depth, a, b, c, stride, accumulate);
  float whole[kRegisterRows * kTileColumns] = {};
  if (accumulate) copy_rows(c, stride, whole, kTileColumns, rows, columns);
  kernel(depth, a, b, whole, kTileColumns, accumulate);
  copy_rows(whole, kTileColumns, c, stride, rows, columns);
}

// C (rows × columns) (+)= A · B from packed operands, each panel after panel, a panel being units(depth) × its width.
template <class Math>
void multiply(const typename Math::Unit* a, const typename Math::Unit* b, float* c, int64_t stride, int64_t rows,
              int64_t columns, int64_t depth, bool accumulate) {
  const int64_t all = units<Math>(depth);
  for (int64_t i = 0; i < rows && all == 0 && !accumulate; ++i) std::memset(c + i * stride, 0, columns * sizeof(float));
  for (int64_t k = 0; k < all; k += kDepthBlock) {
    const int64_t count = std::min(kDepthBlock, all - k);
    for (int64_t j = 0; j < columns; j += kTileColumns) {
      const auto* b_panel = b + j * all + k * kTileColumns;
      for (int64_t i = 0; i < rows; i += Math::kTileRows) {
        const auto* a_panel = a + i * all + k * Math::kTileRows;
        tile<Math>(count, a_panel, b_panel, c + i * stride + j, stride, std::min(Math::kTileRows, rows - i),
                   std::min(kTileColumns, columns - j), accumulate || k > 0);
      }
    }
  }
}

// Lines that are contiguous along k, a square of lanes at a time; read(line, k, steps) gives some of one line.
template <class Read>
void pack_square(int64_t lines, int64_t depth, int64_t width, float* to, Read&& read) {
  for (int64_t i = 0; i < lines; i += kLanes) {
    const int64_t some = std::min(kLanes, lines - i);
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t steps = std::min(kLanes, depth - k);
      Vec square[kLanes];
      for (int64_t line = 0; line < some; ++line) square[line] = read(i + line, k, steps);
      transpose(square, square);
      for (int64_t step = 0; step < steps; ++step) store_lanes(to + (k + step) * width + i, square[step], some);
    }
  }
}

// Packs `count` lines (rows of A, columns of B) into panels of `width`: line i, entry k is at
// from[i·line_stride + k·depth_stride]. One of the strides is 1. What fills up the last panel is 0.
template <class T>
void pack(Floats, const T* from, int64_t line_stride, int64_t depth_stride, int64_t count, int64_t depth,
          int64_t width, float* to) {
  for (int64_t first = 0; first < count; first += width, to += depth * width) {
    const int64_t lines = std::min(width, count - first);
    const T* panel = from + first * line_stride;
    if (lines < width) std::memset(to, 0, depth * width * sizeof(float));
    if (depth_stride != 1) {
      for (int64_t k = 0; k < depth; ++k) {
        const T* line = panel + k * depth_stride;
        float* out = to + k * width;
        int64_t i = 0;
        for (; i + kLanes <= lines; i += kLanes) store_lanes(out + i, load_lanes(line + i));
        if (i < lines) store_lanes(out + i, load_lanes(line + i, lines - i), lines - i);
      }
      continue;
    }
    pack_square(
        lines, depth, width, to,
        [&](int64_t line, int64_t k, int64_t steps) { return load_lanes(panel + line * line_stride + k, steps); });
  }
}

#if defined(__AVX512BF16__)
inline void pack(BfloatPairs, const c10::BFloat16* from, int64_t line_stride, int64_t depth_stride, int64_t count,
                 int64_t depth, int64_t width, uint32_t* to) {
  const int64_t all = units<BfloatPairs>(depth), pairs = divide_up(depth, 2), whole = depth / 2;
  for (int64_t first = 0; first < count; first += width, to += all * width) {
    const int64_t lines = std::min(width, count - first);
    const auto* panel = reinterpret_cast<const uint16_t*>(from) + first * line_stride;
    if (lines < width || whole < all) std::memset(to, 0, all * width * sizeof(uint32_t));
    if (depth_stride != 1) {
      for (int64_t k = 0; k < pairs; ++k) {
        const uint16_t* even = panel + 2 * k * depth_stride;
        uint32_t* out = to + k * width;
        if (k < whole) {
          const uint16_t* odd = even + depth_stride;
          for (int64_t i = 0; i < lines; ++i) out[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
        } else {
          for (int64_t i = 0; i < lines; ++i) out[i] = even[i];
        }
      }
      continue;
    }
    pack_square(lines, whole, width, reinterpret_cast<float*>(to), [&](int64_t line, int64_t k, int64_t steps) {
      return load_lanes(reinterpret_cast<const float*>(panel + line * line_stride + 2 * k), steps);
    });
    if (whole < pairs) {
      for (int64_t line = 0; line < lines; ++line) to[whole * width + line] = panel[line * line_stride + depth - 1];
    }
  }
}
#endif

// The rows of A and the columns of B, for multiply.
template <class Math, class T>
void pack_left(Math math, const T* from, int64_t line_stride, int64_t depth_stride, int64_t count, int64_t depth,
               typename Math::Unit* to) {
  pack(math, from, line_stride, depth_stride, count, depth, Math::kTileRows, to);
}
template <class Math, class T>
void pack_right(Math math, const T* from, int64_t line_stride, int64_t depth_stride, int64_t count, int64_t depth,
                typename Math::Unit* to) {
  pack(math, from, line_stride, depth_stride, count, depth, kTileColumns, to);
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu

#if defined(__AMX_BF16__)
#include "cpu/tiles.h"
#endif
