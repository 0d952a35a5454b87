// Values that do not fit, as errors of the types and in the words of rlhf_kernels/checks.py: what is thrown out of an op as
// std::invalid_argument is a ValueError in Python, std::out_of_range an IndexError.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "tensors.h"

namespace rlhf_kernels::checks {

using tensors::Tensor;

// As Python writes it: the fewest digits that tell it from every other number.
inline std::string written(double value) {
  if (std::isnan(value)) return "nan";
  char text[32];
  const bool is_short = std::abs(value) < 1e16;
  if (is_short && value == std::trunc(value)) {
    std::snprintf(text, sizeof text, "%.1f", value);
    return text;
  }
  for (int digits = 1; digits <= 17; ++digits) {
    is_short ? std::snprintf(text, sizeof text, "%.*g", digits, value)
             : std::snprintf(text, sizeof text, "%.*e", digits - 1, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  return text;
}

inline std::string written(int64_t value) { return std::to_string(value); }

// Of an entry of a dense tensor of this shape, as a tuple in Python.
inline std::string position(const Tensor& shape, int64_t entry) {
  std::string text = shape.dim() == 1 ? ",)" : ")";
  for (int64_t d = shape.dim(); d-- > 0; entry /= shape.size(d)) {
    text = (d > 0 ? ", " : "") + std::to_string(entry % shape.size(d)) + text;
  }
  return "(" + text;
}

// The first entry that is neither 0 nor 1 of a mask that has one.
template <class T>
[[noreturn]] void refuse_mask(const char* name, const Tensor& dense) {
  const T* values = tensors::data<T>(dense);
  const int64_t at = std::find_if(values, values + dense.numel(), [](T x) { return x != 0 && x != 1; }) - values;
  throw std::invalid_argument(std::string(name) + ": is " + written(values[at]) + " at position " +
                              position(dense, at) + ", must be 0 or 1");
}

// index dense and int64. In a backward, `least` may be −1: then the logits are a part of a vocabulary, and that token is in
// another part.
inline void check_index(const char* name, const Tensor& index, const uint8_t* wanted, int64_t size, int64_t least = 0) {
  const auto* values = tensors::data<int64_t>(index);
  for (int64_t at = 0; at < index.numel(); ++at) {
    if (wanted[at] && (values[at] < least || values[at] >= size)) {
      throw std::out_of_range(std::string(name) + ": is " + written(values[at]) + " at position " +
                              position(index, at) + ", must be in [0, " + std::to_string(size) + ")");
    }
  }
}

// tokens as sample_tokens leaves them.
inline void check_drawn(const Tensor& tokens) {
  const auto* values = tensors::data<int64_t>(tokens);
  const int64_t at = std::find(values, values + tokens.numel(), -1) - values;
  if (at == tokens.numel()) return;
  throw std::invalid_argument("logits: row " + position(tokens, at) +
                              " holds NaN or inf, or nothing above -inf, so that no token can be drawn");
}

inline void check_boundaries(const char* name, const int64_t* boundaries, int64_t count, int64_t length) {
  const int64_t first = boundaries[0], last = boundaries[count];
  if (first != 0 || last != length) {
    throw std::invalid_argument(std::string(name) + ": goes from " + written(first) + " to " + written(last) +
                                ", must go from 0 to " + written(length));
  }
  if (!std::is_sorted(boundaries, boundaries + count + 1)) {
    throw std::invalid_argument(std::string(name) + ": decreases, must not");
  }
}

// The sequences that boundaries of this name, dense and int64, cut `like` into.
inline Sequences checked_sequences(const char* name, const Tensor& like, const tensors::OptionalTensor& boundaries) {
  const Sequences sequences = tensors::sequences_of(like, boundaries);
  if (boundaries) check_boundaries(name, tensors::data<int64_t>(*boundaries), sequences.count, like.size(0));
  return sequences;
}

}  // namespace rlhf_kernels::checks
