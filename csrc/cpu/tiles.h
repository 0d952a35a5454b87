// bfloat16 products on the matrix unit of x86 (AMX): 16 rows by 16 pairs times 16 pairs by 16 columns in one
// instruction, summed in float32. Included by matmul.h in the builds that have it.
#pragma once

#include "cpu/matmul.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

constexpr int64_t kUnitRows = 16;                       // of one of the unit's tiles, and its columns
constexpr int64_t kUnitSize = kUnitRows * kUnitRows;    // pairs, or floats, in one
constexpr int64_t kUnitBytes = kUnitRows * 4;           // in a row of one

// The unit's layout while this thread multiplies. Released, because threads that hold one are slower to switch.
struct MatrixUnit {
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int i = 0; i < 8; ++i) {
      layout.row_bytes[i] = kUnitBytes;
      layout.rows[i] = kUnitRows;
    }
    _tile_loadconfig(&layout);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// One tile of the result, 32 × 32 or (kBoth false) its upper half, over `steps` times 16 pairs of k.
template <bool kBoth>
void unit_tile(int64_t steps, const uint32_t* a, const uint32_t* b, float* c, int64_t stride, bool accumulate) {
  constexpr int64_t b_bytes = kTileColumns * sizeof(uint32_t);
  const int64_t c_bytes = stride * static_cast<int64_t>(sizeof(float));
  float* lower = c + kUnitRows * stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kUnitRows, c_bytes);
    if (kBoth) _tile_loadd(2, lower, c_bytes);
    if (kBoth) _tile_loadd(3, lower + kUnitRows, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kBoth) _tile_zero(2);
    if (kBoth) _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, a += 2 * kUnitSize, b += kUnitRows * kTileColumns) {
    _tile_loadd(4, a, kUnitBytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kUnitRows, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if (!kBoth) continue;
    _tile_loadd(5, a + kUnitSize, kUnitBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kUnitRows, c_bytes);
  if (kBoth) _tile_stored(2, lower, c_bytes);
  if (kBoth) _tile_stored(3, lower + kUnitRows, c_bytes);
}

template <>
inline void multiply<BfloatPairs>(const uint32_t* a, const uint32_t* b, float* c, int64_t stride, int64_t rows,
                                  int64_t columns, int64_t depth, bool accumulate) {
  static_assert(BfloatPairs::kTileRows == 2 * kUnitRows && kTileColumns == 2 * kUnitRows && kLanes == kUnitRows);
  const int64_t all = units<BfloatPairs>(depth);
  for (int64_t i = 0; i < rows && all == 0 && !accumulate; ++i) std::memset(c + i * stride, 0, columns * sizeof(float));
  const MatrixUnit unit;
  alignas(64) float whole[BfloatPairs::kTileRows * kTileColumns];
  constexpr int64_t depth_block = 128;
  for (int64_t k = 0; k < all; k += depth_block) {
    const int64_t steps = std::min(depth_block, all - k) / kUnitRows;
    for (int64_t j = 0; j < columns; j += kTileColumns) {
      const uint32_t* b_panel = b + j * all + k * kTileColumns;
      const int64_t some_columns = std::min(kTileColumns, columns - j);
      for (int64_t i = 0; i < rows; i += BfloatPairs::kTileRows) {
        const uint32_t* a_panel = a + i * all + k * BfloatPairs::kTileRows;
        const int64_t some_rows = std::min(BfloatPairs::kTileRows, rows - i);
        float* to = c + i * stride + j;
        const bool add = accumulate || k > 0;
        if (some_rows == BfloatPairs::kTileRows && some_columns == kTileColumns) {
          unit_tile<true>(steps, a_panel, b_panel, to, stride, add);
          continue;
        }
        if (add) copy_rows(to, stride, whole, kTileColumns, some_rows, some_columns);
        if (some_rows > kUnitRows) {
          unit_tile<true>(steps, a_panel, b_panel, whole, kTileColumns, add);
        } else {
          unit_tile<false>(steps, a_panel, b_panel, whole, kTileColumns, add);
        }
        copy_rows(whole, kTileColumns, to, stride, some_rows, some_columns);
      }
    }
  }
}

// The rows of A as the unit reads them: in each panel of 32 rows, tile after tile of 16 pairs of k.
inline void pack_left(BfloatPairs, const c10::BFloat16* from, int64_t line_stride, int64_t depth_stride, int64_t count,
                      int64_t depth, uint32_t* to) {
  constexpr int64_t step = 2 * kUnitRows;  // of k
  for (int64_t first = 0; first < count; first += BfloatPairs::kTileRows) {
    for (int64_t k = 0; k < depth; k += step) {
      const int64_t some = std::min(step, depth - k);
      for (int64_t half = 0; half < BfloatPairs::kTileRows; half += kUnitRows, to += kUnitSize) {
        const int64_t lines = std::clamp<int64_t>(count - first - half, 0, kUnitRows);
        const auto* corner = reinterpret_cast<const uint16_t*>(from) + (first + half) * line_stride + k * depth_stride;
        if (depth_stride == 1) {
          const auto lanes = static_cast<__mmask32>((uint64_t{1} << some) - 1);
          for (int64_t i = 0; i < kUnitRows; ++i) {
            const __m512i line =
                i < lines ? _mm512_maskz_loadu_epi16(lanes, corner + i * line_stride) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + i * kUnitRows, line);
          }
          continue;
        }
        const auto lanes = static_cast<__mmask16>((uint32_t{1} << lines) - 1);
        const auto read = [&](int64_t line) {
          const __m256i bits = line < some ? _mm256_maskz_loadu_epi16(lanes, corner + line * depth_stride)
                                           : _mm256_setzero_si256();
          return _mm512_cvtepu16_epi32(bits);
        };
        Vec square[kUnitRows];
        for (int64_t pair = 0; pair < kUnitRows; ++pair) {
          square[pair] = _mm512_castsi512_ps(
              _mm512_or_si512(read(2 * pair), _mm512_slli_epi32(read(2 * pair + 1), 16)));
        }
        transpose(square, square);
        for (int64_t i = 0; i < kUnitRows; ++i) square[i].store(to + i * kUnitRows);
      }
    }
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
