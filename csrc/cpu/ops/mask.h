#pragma once

#include <cstdint>

#include "tensors.h"

namespace rlhf_kernels::cpu {

using tensors::ScalarType;
using tensors::Tensor;

// A mask as the kernels read it: a byte for every entry, which counts unless that is 0.
class Mask {
 public:
  Mask(const char* name, const Tensor& mask)
      : bytes_(mask.scalar_type() == ScalarType::Bool ? tensors::dense(mask) : read(name, mask)) {}

  const uint8_t* data() const { return static_cast<const uint8_t*>(bytes_.const_data_ptr()); }

 private:
  static Tensor read(const char* name, const Tensor& mask);

  Tensor bytes_;
};

}  // namespace rlhf_kernels::cpu
