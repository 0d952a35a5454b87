// How the token-wise losses' tensors are cut into rows.
#pragma once

#include "cuda/kernels.h"
#include "tensors.h"

namespace rlhf_kernels::cuda {

struct TokenRows {
  int64_t count, length;

  explicit TokenRows(const tensors::Tensor& tensor)
      : count(tensor.dim() == 2 ? tensor.size(0) : 1), length(tensor.size(tensor.dim() - 1)) {}
};

}  // namespace rlhf_kernels::cuda
