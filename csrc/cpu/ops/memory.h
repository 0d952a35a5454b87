// Memory for the results of the ops, and the split of their work over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensors.h"

namespace rlhf_kernels::cpu {

using tensors::ScalarType;
using tensors::Tensor;

// function(begin, end) for ranges of `count` items, on as many threads as the work is worth.
template <class Function>
void parallel(int64_t count, int64_t work_per_item, const Function& function) {
  constexpr int64_t worth_a_thread = 32768;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work_per_item)),
                              function);
}

// Memory that malloc has just got from the system has no pages yet. Asking for them by the run costs half of what one
// fault after another does, which is most of the time of an op that only writes. Where there are pages already, or
// another system, nothing happens.
void ensure_pages(void* start, int64_t bytes);

// For results that are written row by row, each after a call of ensure_pages: what was just cleared is in the cache then.
Tensor without_pages(const std::vector<int64_t>& shape, ScalarType type);
Tensor empty(const std::vector<int64_t>& shape, ScalarType type);
Tensor zeros(const std::vector<int64_t>& shape, ScalarType type);
// In place of a result that is not wanted.
Tensor nothing();
// A float32 scalar.
Tensor scalar(double value);

}  // namespace rlhf_kernels::cpu
