// The kernels of one instruction set, declared from the signatures in kernels.h: of RLHF_ISA its matmuls, and of
// RLHF_SMALL_ISA, which is another one only for the instruction sets of bfloat16, the small kernels.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"

namespace rlhf_kernels::cpu {

#define RLHF_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name;
inline namespace RLHF_ISA {
RLHF_MATMULS(RLHF_DECLARE)
}
inline namespace RLHF_SMALL_ISA {
RLHF_SMALL_KERNELS(RLHF_DECLARE)
}
#undef RLHF_DECLARE

}  // namespace rlhf_kernels::cpu
