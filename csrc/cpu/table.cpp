// The table of kernels of one instruction set.

#include "cpu/table.h"

#include "cpu/vec.h"

namespace rlhf_kernels::cpu {

#define RLHF_NAME_OF(isa) #isa
#define RLHF_NAME(isa) RLHF_NAME_OF(isa)
#define RLHF_TABLE_OF(isa) kernels_##isa
#define RLHF_TABLE(isa) RLHF_TABLE_OF(isa)

extern const Kernels RLHF_TABLE(RLHF_ISA);
const Kernels RLHF_TABLE(RLHF_ISA) = {
    .isa = RLHF_NAME(RLHF_ISA),
    .read_mask = &RLHF_ISA::read_mask,
    .log_prob = &RLHF_ISA::log_prob,
    .log_prob_backward = &RLHF_ISA::log_prob_backward,
    .tile_rows = &RLHF_ISA::tile_rows,
    .packed_rows_size = &RLHF_ISA::packed_rows_size,
    .pack_rows = &RLHF_ISA::pack_rows,
    .depth_panels = &RLHF_ISA::depth_panels,
    .packed_depth_size = &RLHF_ISA::packed_depth_size,
    .pack_depth = &RLHF_ISA::pack_depth,
    .vocabulary_blocks = &RLHF_ISA::vocabulary_blocks,
    .linear_partials = &RLHF_ISA::linear_partials,
    .linear_logits = &RLHF_ISA::linear_logits,
    .linear_loss = &RLHF_ISA::linear_loss,
    .linear_gradient = &RLHF_ISA::linear_gradient,
    .linear_grad_hidden = &RLHF_ISA::linear_grad_hidden,
    .store_rows = &RLHF_ISA::store_rows,
    .linear_grad_weight = &RLHF_ISA::linear_grad_weight,
    .kl_penalty = &RLHF_ISA::kl_penalty,
    .kl_penalty_backward = &RLHF_ISA::kl_penalty_backward,
    .kl_shaped_rewards = &RLHF_ISA::kl_shaped_rewards,
    .gae = &RLHF_ISA::gae,
    .count_wanted = &RLHF_ISA::count_wanted,
    .whiten = &RLHF_ISA::whiten,
    .ppo_policy = &RLHF_ISA::ppo_policy,
    .ppo_value = &RLHF_ISA::ppo_value,
    .sequences_per_group = kLanes,
    .ranking = &RLHF_ISA::ranking,
};

}  // namespace rlhf_kernels::cpu
