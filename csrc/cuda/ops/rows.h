// How the small ops' tensors are cut: into rows of tokens, or into sequences.
#pragma once

#include "cuda/kernels.h"
#include "tensors.h"

namespace rlhf_kernels::cuda {

struct TokenRows {
  int64_t count, length;

  explicit TokenRows(const tensors::Tensor& tensor)
      : count(tensor.dim() == 2 ? tensor.size(0) : 1), length(tensor.size(tensor.dim() - 1)) {}
};

// (B, T), or (N,) cut by boundaries, which a kernel can't check.
inline Sequences sequences_of(const tensors::Tensor& like, const tensors::OptionalTensor& boundaries) {
  if (boundaries) return {boundaries->size(0) - 1, like.size(0), tensors::data<int64_t>(boundaries)};
  return {like.size(0), like.size(1), nullptr};
}

}  // namespace rlhf_kernels::cuda
