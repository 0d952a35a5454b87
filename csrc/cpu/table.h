// The kernels of one instruction set, declared from the signatures in kernels.h.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

std::remove_pointer_t<decltype(Kernels::read_mask)> read_mask;
std::remove_pointer_t<decltype(Kernels::log_prob)> log_prob;
std::remove_pointer_t<decltype(Kernels::log_prob_backward)> log_prob_backward;
std::remove_pointer_t<decltype(Kernels::tile_rows)> tile_rows;
std::remove_pointer_t<decltype(Kernels::packed_rows_size)> packed_rows_size;
std::remove_pointer_t<decltype(Kernels::pack_rows)> pack_rows;
std::remove_pointer_t<decltype(Kernels::depth_panels)> depth_panels;
std::remove_pointer_t<decltype(Kernels::packed_depth_size)> packed_depth_size;
std::remove_pointer_t<decltype(Kernels::pack_depth)> pack_depth;
std::remove_pointer_t<decltype(Kernels::vocabulary_blocks)> vocabulary_blocks;
std::remove_pointer_t<decltype(Kernels::linear_partials)> linear_partials;
std::remove_pointer_t<decltype(Kernels::linear_logits)> linear_logits;
std::remove_pointer_t<decltype(Kernels::linear_loss)> linear_loss;
std::remove_pointer_t<decltype(Kernels::linear_gradient)> linear_gradient;
std::remove_pointer_t<decltype(Kernels::linear_grad_hidden)> linear_grad_hidden;
std::remove_pointer_t<decltype(Kernels::store_rows)> store_rows;
std::remove_pointer_t<decltype(Kernels::linear_grad_weight)> linear_grad_weight;
std::remove_pointer_t<decltype(Kernels::kl_penalty)> kl_penalty;
std::remove_pointer_t<decltype(Kernels::kl_penalty_backward)> kl_penalty_backward;
std::remove_pointer_t<decltype(Kernels::kl_shaped_rewards)> kl_shaped_rewards;
std::remove_pointer_t<decltype(Kernels::gae)> gae;
std::remove_pointer_t<decltype(Kernels::count_wanted)> count_wanted;
std::remove_pointer_t<decltype(Kernels::whiten)> whiten;
std::remove_pointer_t<decltype(Kernels::ppo_policy)> ppo_policy;
std::remove_pointer_t<decltype(Kernels::ppo_value)> ppo_value;
std::remove_pointer_t<decltype(Kernels::ranking)> ranking;

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
