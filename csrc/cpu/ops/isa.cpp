// Picks the kernels for the processor this runs on.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#if defined(RLHF_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rlhf_kernels::cpu {

#if defined(__aarch64__)
extern const Kernels kernels_neon;
#else
extern const Kernels kernels_baseline;
#endif
#if defined(RLHF_X86)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx_bf16;
#endif

namespace {

#if defined(RLHF_X86)
// Whether the processor has the matrix unit and Linux lets this process use its registers, for which one has to ask.
bool matrix_unit() {
#if defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  // Compilers have no common name for this feature, so the processor is asked: leaf 7, bit 22 of EDX.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  return there && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

const Kernels& pick() {
  struct Choice {
    const Kernels* kernels;
    bool runs;
    bool only_if_asked = false;
  };
  const Choice choices[] = {
#if defined(RLHF_X86)
      {&kernels_amx_bf16, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && matrix_unit()},
      // Intel's vectors multiply pairs of bfloat16 at the rate of floats or below, AMD's at twice that.
      {&kernels_avx512_bf16, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"),
       !__builtin_cpu_is("amd")},
      {&kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
#if defined(__aarch64__)
      {&kernels_neon, true},  // which every such processor has
#else
      {&kernels_baseline, true},
#endif
  };
  const char* asked = std::getenv("RLHF_KERNELS_ISA");
  for (const auto& choice : choices) {
    if (choice.runs && (asked ? choice.kernels->isa == std::string(asked) : !choice.only_if_asked)) return *choice.kernels;
  }
  std::string fitting;
  for (const auto& choice : choices) {
    if (choice.runs) fitting += (fitting.empty() ? "" : ", ") + std::string(choice.kernels->isa);
  }
  throw std::runtime_error("RLHF_KERNELS_ISA: is '" + std::string(asked) + "', must be one of " + fitting +
                           ", which this build has and this processor runs");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = pick();
  return chosen;
}

}  // namespace rlhf_kernels::cpu
