// Whether the GPU's driver is new enough for these kernels.

#include <cuda_runtime.h>
#include <dlfcn.h>

#include "cuda/kernels.h"

namespace rlhf_kernels::cuda {

// Asks the driver's library for its version and nothing else. The runtime's cudaDriverGetVersion would also initialise the
// driver, and then a process can no longer fork and use a GPU in the child. An import must not do that.
Versions versions() {
  static const Versions answer = [] {
    Versions found{CUDART_VERSION, 0};
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return found;
    // Stays loaded: torch is about to load it too.
    const auto get_version = reinterpret_cast<int (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
    if (!get_version || get_version(&found.driver) != 0) found.driver = 0;
    return found;
  }();
  return answer;
}

// A driver runs what any minor version of its own major version has compiled (NVIDIA's "CUDA Compatibility", minor version
// compatibility), but for PTX, which is in here for GPUs that are yet to come.
bool driver_is_too_old() {
  const auto [built_with, driver] = versions();
  return driver != 0 && driver / 1000 < built_with / 1000;
}

}  // namespace rlhf_kernels::cuda
