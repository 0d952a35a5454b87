// A mask's tensor as the kernels take it.
#pragma once

#include "cuda/kernels.h"
#include "tensors.h"

namespace rlhf_kernels::cuda {

inline Mask mask_of(const tensors::Tensor& dense) {
  const MaskType type = tensors::mask_type_of(dense.scalar_type());
  return {dense.const_data_ptr(), type.size, type.sign_bits};
}

}  // namespace rlhf_kernels::cuda
