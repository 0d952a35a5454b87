// Masks and integers as the kernels take them.
#pragma once

#include "cuda/kernels.h"
#include "tensors.h"

namespace rlhf_kernels::cuda {

inline Mask mask_of(const tensors::OptionalTensor& tensor) {
  if (!tensor) return {};
  const MaskType type = tensors::mask_type_of(tensor->scalar_type());
  return {tensor->const_data_ptr(), type.size, type.sign_bits};
}

inline Integers integers_of(const tensors::Tensor& tensor) {
  if (const auto all = tensors::number_of(tensor)) return {nullptr, true, {}, *all};
  return {tensor.const_data_ptr(), tensor.scalar_type() == tensors::ScalarType::Long, tensors::places_of(tensor), 0};
}

}  // namespace rlhf_kernels::cuda
