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
  std::unique_ptr<float[]> scores, gradients, present;
  std::unique_ptr<int64_t[]> ranks;
  Scratch scratch;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kLanes;
    const int64_t lanes = in.prompts.count - first < kLanes ? in.prompts.count - first : kLanes;
    int64_t widest = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t length = span_of(in.prompts, first + lane).length;
      widest = length > widest ? length : widest;
    }
    if (widest > capacity) {
      capacity = widest;
      scores.reset(new float[capacity * kLanes]);
      gradients.reset(new float[capacity * kLanes]);
      present.reset(new float[capacity * kLanes]);
      ranks.reset(new int64_t[capacity * kLanes]);
    }
    for (int64_t i = 0; i < widest * kLanes; ++i) {
      scores[i] = gradients[i] = present[i] = 0;
      ranks[i] = 0;
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Span span = span_of(in.prompts, first + lane);
      for (int64_t t = 0; t < span.length; t += kRowBlock) {
        const int64_t count = span.length - t < kRowBlock ? span.length - t : kRowBlock;
        const float* row = read(in.scores, span.row, span.column + t, count, scratch);
        for (int64_t k = 0; k < count; ++k) {
          const int64_t flat = span.flat + t + k, at = (t + k) * kLanes + lane;
          if (!in.wanted[flat]) continue;
          scores[at] = row[k];
          present[at] = 1;
          ranks[at] = in.ranks[flat];
        }
      }
    }
    Vec loss(0.0f), right(0.0f), pairs(0.0f);
    const Vec zero(0.0f), half(0.5f), one(1.0f), margin(in.margin);
    for (int64_t i = 0; i + 1 < widest; ++i) {
      const Vec score_i = load_lanes(&scores[i * kLanes]), present_i = load_lanes(&present[i * kLanes]);
      Vec gradient_i = load_lanes(&gradients[i * kLanes]);
      for (int64_t j = i + 1; j < widest; ++j) {
        float order[kLanes];  // 1: i is ranked better; −1: j is; 0: a tie
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t a = ranks[i * kLanes + lane], b = ranks[j * kLanes + lane];
          order[lane] = static_cast<float>((a < b) - (a > b));
        }
        const Vec sign = load_lanes(order) * present_i * load_lanes(&present[j * kLanes]);
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
      if (!in.gradient) continue;
      const Span span = span_of(in.prompts, first + lane);
      for (int64_t k = 0; k < span.length; ++k) {
        in.gradient[span.flat + k] = static_cast<float>(gradients[k * kLanes + lane] * share);
      }
    }
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
