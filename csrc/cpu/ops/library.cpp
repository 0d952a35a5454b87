// Every op's schema, defined once for all devices, and which build of the CPU kernels runs.

#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

#include "cpu/kernels.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(rlhf_kernels, library) { rlhf_kernels::define_ops(library); }

// The instruction set in use; or, after a "!", why there is none.
extern "C" __attribute__((visibility("default"))) const char* rlhf_kernels_isa() {
  static const std::string answer = [] {
    try {
      return std::string(rlhf_kernels::cpu::kernels().isa);
    } catch (const std::exception& error) {
      return "!" + std::string(error.what());
    }
  }();
  return answer.c_str();
}
