// Rewards shaped by the KL penalty, block by block: GAE makes them just before it uses them.
#pragma once

#include "cpu/rows.h"
#include "rlhf_kernels/kl_reward.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

// The last unmasked position of a sequence; −1 if there is none.
inline int64_t last_wanted(const uint8_t* wanted, int64_t length) {
  int64_t last = length - 1;
  while (last >= 0 && !wanted[last]) --last;
  return last;
}

// Rewards and KL of a block of one sequence, 0 where masked; the score goes to position `last` of the block, if ≥ 0.
inline void shape_block(const KlShaping& in, const Span& span, const uint8_t* wanted, int64_t start, int64_t count,
                        int64_t last, int64_t b, Scratch* scratch) {
  const float* logprobs = read(in.logprobs, span.row, span.column + start, count, scratch[0]);
  const float* ref = read(in.ref_logprobs, span.row, span.column + start, count, scratch[1]);
  const int64_t flat = span.flat + start;
  const Vec price(static_cast<float>(-in.beta));
  for_lanes(count, [&](int64_t i, int64_t lanes) {
    const Vec kl = kept(
        lanes_of(wanted + flat + i, lanes),
        rlhf_kernels::kl_penalty(load_lanes(logprobs + i, lanes), load_lanes(ref + i, lanes), in.estimator));
    store_lanes(in.kl + flat + i, kl, lanes);
    store_lanes(in.rewards + flat + i, price * kl, lanes);
  });
  if (last < 0) return;
  in.rewards[flat + last] = shaped_reward(clipped_score(in.scores[b], in.score_clip), in.beta, in.kl[flat + last]);
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
