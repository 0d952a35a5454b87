// Vectors of float for one instruction set: torch's own (at::vec), what they lack, and the names csrc/include uses. What
// one family alone asks of them is in a file of its name, which it includes itself.
// Only for translation units that are built once per instruction set; RLHF_ISA names it.
#pragma once

#include "cpu/vec/doubles.h"
#include "cpu/vec/lanes.h"
#include "cpu/vec/memory.h"
#include "cpu/vec/names.h"
#include "cpu/vec/transpose.h"
