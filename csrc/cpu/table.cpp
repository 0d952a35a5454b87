// The table of kernels of one instruction set.

#include "cpu/table.h"

namespace rlhf_kernels::cpu {

#define RLHF_NAME_OF(isa) #isa
#define RLHF_NAME(isa) RLHF_NAME_OF(isa)
#define RLHF_TABLE_OF(isa) kernels_##isa
#define RLHF_TABLE(isa) RLHF_TABLE_OF(isa)

extern const Kernels RLHF_TABLE(RLHF_ISA);
const Kernels RLHF_TABLE(RLHF_ISA) = {
    .isa = RLHF_NAME(RLHF_ISA),
#define RLHF_ENTRY(name) .name = &RLHF_SMALL_ISA::name,
    RLHF_SMALL_KERNELS(RLHF_ENTRY)
#undef RLHF_ENTRY
#define RLHF_ENTRY(name) .name = &RLHF_ISA::name,
    RLHF_MATMULS(RLHF_ENTRY)
#undef RLHF_ENTRY
};

}  // namespace rlhf_kernels::cpu
