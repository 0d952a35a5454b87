// What every op for CUDA tensors begins with: the tensors' device and its current stream, and how they are registered. This
// is a shared object of its own, which only a torch with CUDA loads: the current stream lives in libtorch_cuda.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cuda/kernels.h"
#include "tensors.h"

// Used as RLHF_CUDA_OPS(library) { library.impl(...); }. With a driver that is too old nothing is registered, and Triton's
// kernels are registered instead. For the tests the kernels run on CPU tensors, under a name of their own.
#if defined(RLHF_CUDA_EMULATED)
#define RLHF_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_emulated, CPU, library)
#else
#define RLHF_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, library)
#endif
#define RLHF_CUDA_OPS(library)                                                        \
  static void register_ops(torch::stable::detail::StableLibrary& library);            \
  RLHF_CUDA_LIBRARY(checked_library) {                                                \
    if (!rlhf_kernels::cuda::driver_is_too_old()) register_ops(checked_library);      \
  }                                                                                   \
  static void register_ops(torch::stable::detail::StableLibrary& library)

namespace rlhf_kernels::cuda {

using tensors::ScalarType;
using tensors::Tensor;

// Makes a tensor's device the current one as long as it lives, and knows its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : device_index_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type_));
#if !defined(RLHF_CUDA_EMULATED)
    guard_.emplace(device_index_);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index_, &stream));
#endif
  }

  Tensor empty(const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) const {
    return tensors::allocate(shape, type, device_type_, device_index_);
  }
  Tensor empty_like(const Tensor& tensor) const { return empty(tensors::sizes(tensor)); }
  Tensor nothing() const { return empty({0}); }
  Tensor bytes(int64_t count) const { return empty({count}, ScalarType::Byte); }
  Tensor zeros(const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) const {
    Tensor result = empty(shape, type);
    return torch::stable::zero_(result);
  }

  Stream stream = nullptr;

 private:
  int32_t device_type_ = 0, device_index_;
#if !defined(RLHF_CUDA_EMULATED)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

}  // namespace rlhf_kernels::cuda
