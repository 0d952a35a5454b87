// Rows of small matrices, read block by block as float32.
#pragma once

#include "cpu/vec.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

// Blocks of a few arrays fit the L1 cache together.
constexpr int64_t kRowBlock = 1024;

struct Scratch {
  float values[kRowBlock];
};

template <class Function>
inline void for_lanes(int64_t count, Function&& function) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) function(i, kLanes);
  if (i < count) function(i, count - i);
}

inline void copy_as_float(const void* from, Dtype dtype, int64_t start, int64_t count, float* to) {
  for_dtype(dtype, [&](auto* type) {
    const auto* values = static_cast<const std::remove_pointer_t<decltype(type)>*>(from) + start;
    for_lanes(count, [&](int64_t i, int64_t lanes) { store_lanes(to + i, load_lanes(values + i, lanes), lanes); });
  });
}

// The block itself where it is float32 already, else its values in scratch.
inline const float* read(const View& view, int64_t row, int64_t start, int64_t count, Scratch& scratch) {
  const int64_t at = row * view.row_stride + start * view.stride;
  if (view.dtype == Dtype::float32 && view.stride == 1) return static_cast<const float*>(view.data) + at;
  if (view.stride == 1) {
    copy_as_float(view.data, view.dtype, at, count, scratch.values);
    return scratch.values;
  }
  for_dtype(view.dtype, [&](auto* type) {
    const auto* from = static_cast<const std::remove_pointer_t<decltype(type)>*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) scratch.values[i] = static_cast<float>(from[i * view.stride]);
  });
  return scratch.values;
}

// As `read`, but as values of T. T is other than float only where for_common_dtype chose it: then the matrix holds values of T
// in dense rows, and nothing is copied.
template <class T>
inline const T* read_as(const View& view, int64_t row, int64_t start, int64_t count, Scratch& scratch) {
  if constexpr (std::is_same_v<T, float>) return read(view, row, start, count, scratch);
  return static_cast<const T*>(view.data) + row * view.row_stride + start;
}

// Calls function with a null pointer of T: the dtype of the matrices, if all have the same one and dense rows, so that they
// are read in place; else float, and blocks of them are converted into scratch.
template <class Function, class... Views>
inline void for_common_dtype(Function&& function, const View& first, const Views&... others) {
  const bool common = first.stride == 1 && ((others.stride == 1 && others.dtype == first.dtype) && ...);
  for_dtype(common ? first.dtype : Dtype::float32, function);
}

// Where a sequence lies: its row and first column in the inputs, and its first position in contiguous outputs.
struct Span {
  int64_t row, column, flat, length;
};

inline Span span_of(const Sequences& sequences, int64_t b) {
  if (!sequences.boundaries) return {b, 0, b * sequences.length, sequences.length};
  const int64_t begin = sequences.boundaries[b];
  return {0, begin, begin, sequences.boundaries[b + 1] - begin};
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
