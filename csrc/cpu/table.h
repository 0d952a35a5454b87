// The kernels of one instruction set, declared from the signatures in kernels.h.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

#define RLHF_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name;
RLHF_KERNELS(RLHF_DECLARE)
#undef RLHF_DECLARE

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
