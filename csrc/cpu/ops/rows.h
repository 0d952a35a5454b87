// Tokens as the kernels of the small ops take them: in rows, which the reduction of a loss weighs.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/ops/mask.h"
#include "cpu/ops/memory.h"
#include "tensors.h"

namespace rlhf_kernels::cpu {

// A 1-D tensor is cut into rows of this length, so that its sums are made in one order on any number of threads.
inline constexpr int64_t kFlatRow = 4096;

struct TokenRows {
  int64_t count, length, positions;
  bool matrix;

  explicit TokenRows(const Tensor& tensor) : TokenRows(tensor, tensor.dim() == 2) {}

  // Each row costs some time by itself. With token-mean the rows do not matter, so contiguous inputs are read as flat ones,
  // in rows long enough for that time not to show.
  TokenRows(const Tensor& a, const Tensor& b, const Tensor& c, const std::string& reduction)
      : TokenRows(a, a.dim() == 2 && !(reduction == "token-mean" && a.is_contiguous() && b.is_contiguous() &&
                                       c.is_contiguous())) {}

  TokenRows(const Tensor& tensor, bool as_matrix) : matrix(as_matrix) {
    positions = tensor.numel();
    length = matrix ? tensor.size(1) : kFlatRow;
    count = matrix ? tensor.size(0) : divide_up(positions, kFlatRow);
  }

  View view(const Tensor& tensor) const {
    View result = tensors::view_of(tensor);
    if (!matrix && tensor.dim() == 2) result.stride = 1;  // where a dimension has one entry, its stride says nothing
    if (!matrix) result.row_stride = length * result.stride;
    return result;
  }
};

// How a reduction weighs the positions of each row, from the mask alone. A denominator takes the place of what the
// reduction counts: positions or rows.
struct Weights {
  std::vector<double> rows;
  int64_t positions = 0;

  Weights(const Mask& mask, int64_t count, int64_t length, int64_t all, const std::string& reduction,
          std::optional<double> denominator)
      : rows(count) {
    std::vector<int64_t> counts(count);
    parallel(count, mask.work(length), [&](int64_t begin, int64_t end) {
      mask.read(begin * length, std::min(end * length, all));
      for (int64_t row = begin; row < end; ++row) {
        const int64_t stop = std::min(length, all - row * length);
        counts[row] = kernels().count_wanted(mask.data() + row * length, stop);
      }
    });
    mask.check();
    int64_t some = 0;
    for (const int64_t here : counts) {
      positions += here;
      some += here > 0;
    }
    const bool by_token = reduction == "token-mean";
    const double number = denominator.value_or(static_cast<double>(by_token ? positions : some));
    const double share = number > 0 ? 1.0 / number : 0.0;
    for (int64_t row = 0; row < count; ++row) {
      rows[row] = reduction == "seq-mean-token-mean" && counts[row] ? share / static_cast<double>(counts[row]) : share;
    }
  }
};

}  // namespace rlhf_kernels::cpu
