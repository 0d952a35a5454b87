// The ranking loss and its gradient, a vector's worth of prompts at a time: one prompt per lane, so that no pair waits
// for another and nothing of size (K, K) is held.

#include <memory>

#include "cpu/rows.h"
#include "cpu/table.h"
#include "rlhf_kernels/ranking.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

void ranking(const RankingArguments& in, int64_t begin, int64_t end) {
  int64_t capacity = 0;
  std::unique_ptr<float[]> scores, ranks, gradients, present;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kLanes;
    const int64_t lanes = in.prompts.count - first < kLanes ? in.prompts.count - first : kLanes;
    int64_t start[kLanes] = {}, length[kLanes] = {}, widest = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Span span = span_of(in.prompts, first + lane);
      start[lane] = span.flat;
      length[lane] = span.length;
      widest = span.length > widest ? span.length : widest;
    }
    if (widest > capacity) {
      capacity = widest;
      scores.reset(new float[capacity * kLanes]);
      gradients.reset(new float[capacity * kLanes]);
      present.reset(new float[capacity * kLanes]);
      ranks.reset(new float[capacity * kLanes]);
    }
    // From rows to lanes, without a branch: what lies past a prompt's end is read from its beginning, and not present.
    constexpr int64_t exact = int64_t{1} << 24;  // up to here float32 has every rank as it is
    bool ranks_fit = true;
    for (int64_t k = 0; k < widest; ++k) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const bool inside = k < length[lane];
        const int64_t flat = inside ? start[lane] + k : 0, at = k * kLanes + lane;
        const bool wanted = inside & (in.wanted[flat] != 0);
        scores[at] = wanted ? in.scores[flat] : 0.0f;
        present[at] = wanted ? 1.0f : 0.0f;
        ranks[at] = static_cast<float>(in.ranks[flat]);
        ranks_fit &= (in.ranks[flat] <= exact) & (in.ranks[flat] >= -exact);
        gradients[at] = 0;
      }
    }
    // Only their order matters: how many of the prompt's are smaller serves as well.
    for (int64_t lane = 0; !ranks_fit && lane < lanes; ++lane) {
      const int64_t* own = in.ranks + start[lane];
      for (int64_t k = 0; k < length[lane]; ++k) {
        int64_t smaller_ones = 0;
        for (int64_t other = 0; other < length[lane]; ++other) smaller_ones += own[other] < own[k];
        ranks[k * kLanes + lane] = static_cast<float>(smaller_ones);
      }
    }
    Vec loss(0.0f), right(0.0f), pairs(0.0f);
    const Vec zero(0.0f), half(0.5f), one(1.0f), minus_one(-1.0f), margin(in.margin);
    for (int64_t i = 0; i + 1 < widest; ++i) {
      const Vec score_i = load_lanes(&scores[i * kLanes]), present_i = load_lanes(&present[i * kLanes]);
      const Vec rank_i = load_lanes(&ranks[i * kLanes]);
      Vec gradient_i = load_lanes(&gradients[i * kLanes]);
      for (int64_t j = i + 1; j < widest; ++j) {
        const Vec rank_j = load_lanes(&ranks[j * kLanes]);
        // 1: i is ranked better; −1: j is; 0: a tie, or one of them is not there.
        const Vec order = where_greater(rank_j, rank_i, one, where_greater(rank_i, rank_j, minus_one, zero));
        const Vec sign = order * present_i * load_lanes(&present[j * kLanes]);
        const Vec counts = sign.abs();
        const Vec difference = sign * (score_i - load_lanes(&scores[j * kLanes]));
        const auto pair = ranking_pair(difference - margin);
        // Cut out, not multiplied: a score that is infinite or NaN stays in its own pairs.
        const Vec is_pair = counts > zero;
        loss = loss + (pair.loss & is_pair);
        const Vec credit = where_greater(difference, zero, one, where_greater(zero, difference, zero, half));
        right = right + (credit & is_pair);
        pairs = pairs + counts;
        const Vec slope = (pair.gradient * sign) & is_pair;
        gradient_i = gradient_i + slope;
        store_lanes(&gradients[j * kLanes], load_lanes(&gradients[j * kLanes]) - slope);
      }
      store_lanes(&gradients[i * kLanes], gradient_i);
    }
    float losses[kLanes], rights[kLanes], totals[kLanes];
    store_lanes(losses, loss);
    store_lanes(rights, right);
    store_lanes(totals, pairs);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const bool counts = totals[lane] > 0;
      const double share = counts ? 1.0 / totals[lane] : 0.0;
      in.counts[first + lane] = counts;
      in.losses[first + lane] = counts ? losses[lane] * share : 0;
      in.accuracies[first + lane] = counts ? rights[lane] * share : 0;
      for (int64_t k = 0; in.gradient && k < length[lane]; ++k) {
        in.gradient[start[lane] + k] = static_cast<float>(gradients[k * kLanes + lane] * share);
      }
    }
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
