// What rlhf_kernels/backends.py asks of this library; and for the tests every op's schema, under a name of its own.

#include "cuda/kernels.h"

#if defined(RLHF_CUDA_EMULATED)
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(rlhf_kernels_emulated, library) { rlhf_kernels::define_ops(library); }

extern "C" __attribute__((visibility("default"))) int64_t rlhf_kernels_launches() { return emulation::launches(); }
#endif

namespace cuda = rlhf_kernels::cuda;

// Whether the driver is too old, so that no op is registered, and CUDA's versions (see cuda::versions()).
extern "C" __attribute__((visibility("default"))) bool rlhf_kernels_driver_is_too_old(int* built_with, int* driver) {
  *built_with = cuda::versions().built_with;
  *driver = cuda::versions().driver;
  return cuda::driver_is_too_old();
}
