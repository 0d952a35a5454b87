// The ranking loss and its gradient, a vector's worth of prompts at a time: one prompt per lane, so that no pair waits
// for another and nothing of size (K, K) is held.

#include <algorithm>
#include <memory>

#include "cpu/rows.h"
#include "cpu/table.h"
#include "rlhf_kernels/ranking.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

namespace {

// float32 has every rank up to here as it is.
constexpr int64_t kExactRank = int64_t{1} << 24;

// Where a group's prompts lie: one behind another.
struct Group {
  int64_t start[kLanes] = {}, length[kLanes] = {}, lanes, begin, end, widest = 0;

  Group(const Sequences& prompts, int64_t group) {
    const int64_t first = group * kLanes;
    lanes = std::min(kLanes, prompts.count - first);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Span span = span_of(prompts, first + lane);
      start[lane] = span.flat;
      length[lane] = span.length;
      widest = std::max(widest, span.length);
    }
    begin = start[0];
    end = start[lanes - 1] + length[lanes - 1];
  }
};

// Whether some float32 is that of several ranks. Only their order matters, so then how many of the prompt's are smaller
// takes their place.
void order_ranks(const Group& group, const int64_t* ranks, float* result) {
  bool exact = true;
  for (int64_t i = group.begin; i < group.end; ++i) {
    result[i - group.begin] = static_cast<float>(ranks[i]);
    exact &= (ranks[i] <= kExactRank) & (ranks[i] >= -kExactRank);
  }
  for (int64_t lane = 0; !exact && lane < group.lanes; ++lane) {
    const int64_t* own = ranks + group.start[lane];
    for (int64_t k = 0; k < group.length[lane]; ++k) {
      int64_t smaller_ones = 0;
      for (int64_t other = 0; other < group.length[lane]; ++other) smaller_ones += own[other] < own[k];
      result[group.start[lane] - group.begin + k] = static_cast<float>(smaller_ones);
    }
  }
}

// From a row per prompt to a lane per prompt. Past a prompt's end stands what lies there, which nothing may use.
void rows_to_lanes(const Group& group, const float* rows, float* lanes) {
  for (int64_t k = 0; k < group.widest; k += kLanes) {
    Vec square[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t at = group.start[lane] - group.begin + k, left = group.end - group.begin - at;
      square[lane] = lane < group.lanes && left > 0 ? load_lanes(rows + at, std::min(kLanes, left)) : Vec(0.0f);
    }
    transpose(square);
    for (int64_t i = 0; i < std::min(kLanes, group.widest - k); ++i) store_lanes(lanes + (k + i) * kLanes, square[i]);
  }
}

void lanes_to_rows(const Group& group, const float* lanes, float* rows) {
  for (int64_t k = 0; k < group.widest; k += kLanes) {
    Vec square[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      square[i] = k + i < group.widest ? load_lanes(lanes + (k + i) * kLanes) : Vec(0.0f);
    }
    transpose(square);
    for (int64_t lane = 0; lane < group.lanes; ++lane) {
      const int64_t left = group.length[lane] - k;
      if (left > 0) store_lanes(rows + group.start[lane] + k, square[lane], std::min(kLanes, left));
    }
  }
}

}  // namespace

void ranking(const RankingArguments& in, int64_t begin, int64_t end) {
  int64_t capacity = 0;
  std::unique_ptr<float[]> rows, scores, ranks, gradients, lost, present;
  for (int64_t number = begin; number < end; ++number) {
    const Group group(in.prompts, number);
    const int64_t first = number * kLanes, widest = group.widest;
    if (widest > capacity) {
      capacity = widest;
      for (auto* buffer : {&rows, &scores, &ranks, &gradients, &lost, &present}) buffer->reset(new float[capacity * kLanes]);
    }
    rows_to_lanes(group, in.scores + group.begin, scores.get());
    order_ranks(group, in.ranks, rows.get());
    rows_to_lanes(group, rows.get(), ranks.get());
    const Vec one(1.0f), zero(0.0f);
    for_lanes(group.end - group.begin, [&](int64_t i, int64_t lanes) {
      store_lanes(rows.get() + i, one & lanes_of(in.wanted + group.begin + i, lanes), lanes);
    });
    rows_to_lanes(group, rows.get(), present.get());
    float lengths[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) lengths[lane] = static_cast<float>(group.length[lane]);
    for (int64_t k = 0; k < widest; ++k) {
      const Vec inside = Vec(static_cast<float>(k)) < load_lanes(lengths);
      store_lanes(&present[k * kLanes], load_lanes(&present[k * kLanes]) & inside);
      store_lanes(&gradients[k * kLanes], zero);
      store_lanes(&lost[k * kLanes], zero);
    }
    double losses[kLanes] = {}, rights[kLanes] = {}, totals[kLanes] = {};
    const auto add = [](double(&sums)[kLanes], const Vec& values) {
      float lanes[kLanes];
      store_lanes(lanes, values);
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += static_cast<double>(lanes[lane]);
    };
    const Vec half(0.5f), minus_one(-1.0f), margin(in.margin);
    for (int64_t i = 0; i + 1 < widest; ++i) {
      const Vec score_i = load_lanes(&scores[i * kLanes]), present_i = load_lanes(&present[i * kLanes]);
      const Vec rank_i = load_lanes(&ranks[i * kLanes]);
      // A float32 counts to 2^24, and sums of more than a few numbers lose digits: no chain is longer than a row.
      CompensatedSum loss, gradient_i{load_lanes(&gradients[i * kLanes]), load_lanes(&lost[i * kLanes])};
      Vec right(0.0f), pairs(0.0f);
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
        loss.add(pair.loss & is_pair);
        const Vec credit = where_greater(difference, zero, one, where_greater(zero, difference, zero, half));
        right = right + (credit & is_pair);
        pairs = pairs + counts;
        const Vec slope = (pair.gradient * sign) & is_pair;
        gradient_i.add(slope);
        CompensatedSum gradient_j{load_lanes(&gradients[j * kLanes]), load_lanes(&lost[j * kLanes])};
        gradient_j.add(zero - slope);
        store_lanes(&gradients[j * kLanes], gradient_j.total);
        store_lanes(&lost[j * kLanes], gradient_j.lost);
      }
      store_lanes(&gradients[i * kLanes], gradient_i.total);
      add(losses, loss.total);
      add(rights, right);
      add(totals, pairs);
    }
    for (int64_t lane = 0; lane < group.lanes; ++lane) {
      const bool counts = totals[lane] > 0;
      const double share = counts ? 1.0 / totals[lane] : 0.0;
      in.counts[first + lane] = counts;
      in.losses[first + lane] = counts ? losses[lane] * share : 0;
      in.accuracies[first + lane] = counts ? rights[lane] * share : 0;
    }
    if (!in.gradient) continue;
    float divisors[kLanes];  // without a pair the gradient is 0 already
    for (int64_t lane = 0; lane < kLanes; ++lane) divisors[lane] = static_cast<float>(std::max(1.0, totals[lane]));
    const Vec at_least_1 = load_lanes(divisors);
    for (int64_t k = 0; k < widest; ++k) {
      store_lanes(&gradients[k * kLanes], load_lanes(&gradients[k * kLanes]) / at_least_1);
    }
    lanes_to_rows(group, gradients.get(), in.gradient);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
