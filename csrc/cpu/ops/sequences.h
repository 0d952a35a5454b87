#pragma once

#include "checks.h"
#include "tensors.h"

namespace rlhf_kernels::cpu {

// (B, T); or (N,), which boundaries of this name cut into sequences.
inline Sequences sequences_of(const tensors::Tensor& like, const char* name,
                              const tensors::OptionalTensor& boundaries) {
  if (!boundaries) return {like.size(0), like.size(1), nullptr};
  const int64_t count = boundaries->size(0) - 1;
  checks::check_boundaries(name, tensors::data<int64_t>(boundaries), count, like.size(0));
  return {count, like.size(0), tensors::data<int64_t>(boundaries)};
}

}  // namespace rlhf_kernels::cpu
