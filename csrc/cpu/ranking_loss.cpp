// The ranking loss and its gradient, a vector's worth of prompts at a time: one prompt per lane, so that no pair waits
// for another and nothing of size (K, K) is held.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

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
  int64_t least = 0, most = 0;
  for (int64_t i = group.begin; i < group.end; ++i) {
    least = ranks[i] < least ? ranks[i] : least;
    most = ranks[i] > most ? ranks[i] : most;
  }
  for (int64_t i = group.begin; i < group.end; ++i) result[i - group.begin] = static_cast<float>(ranks[i]);
  const bool exact = least >= -kExactRank && most <= kExactRank;
  for (int64_t lane = 0; !exact && lane < group.lanes; ++lane) {
    const int64_t* own = ranks + group.start[lane];
    for (int64_t k = 0; k < group.length[lane]; ++k) {
      int64_t smaller_ones = 0;
      for (int64_t other = 0; other < group.length[lane]; ++other) smaller_ones += own[other] < own[k];
      result[group.start[lane] - group.begin + k] = static_cast<float>(smaller_ones);
    }
  }
}

// From a row per prompt to a lane per prompt. Past a prompt's end stands what lies there, up to `limit` floats, which
// nothing may use.
void rows_to_lanes(const Group& group, const float* rows, int64_t limit, Vec* lanes) {
  for (int64_t k = 0; k < group.widest; k += kLanes) {
    Vec square[kLanes];
    const int64_t last = group.start[kLanes - 1] - group.begin + k;
    if (group.lanes == kLanes && last + kLanes <= limit) {
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) square[lane] = load_lanes(rows + group.start[lane] - group.begin + k);
    } else {
      for (int64_t lane = 0; lane < group.lanes; ++lane) {
        const int64_t at = group.start[lane] - group.begin + k;
        if (at < limit) square[lane] = load_lanes(rows + at, std::min(kLanes, limit - at));
      }
    }
    transpose(square);
    for (int64_t i = 0; i < std::min(kLanes, group.widest - k); ++i) lanes[k + i] = square[i];
  }
}

void lanes_to_rows(const Group& group, const Vec* lanes, float* rows) {
  for (int64_t k = 0; k < group.widest; k += kLanes) {
    Vec square[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) square[i] = k + i < group.widest ? lanes[k + i] : Vec(0.0f);
    transpose(square);
    for (int64_t lane = 0; lane < group.lanes; ++lane) {
      const int64_t left = group.length[lane] - k;
      if (left > 0) store_lanes(rows + group.start[lane] + k, square[lane], std::min(kLanes, left));
    }
  }
}

// A prompt per lane, completion by completion.
struct Columns {
  int64_t capacity = 0;
  std::unique_ptr<Vec[]> scores, ranks;
  std::unique_ptr<CompensatedSum[]> gradients;

  void make_room(int64_t widest) {
    if (widest <= capacity) return;
    capacity = widest;
    scores.reset(new Vec[widest]);
    ranks.reset(new Vec[widest]);
    gradients.reset(new CompensatedSum[widest]);
  }
};

// Of float32 additions that follow on one another. More lose digits, and a float32 counts to 2^24 only.
constexpr int64_t kLongestChain = 64;

// Per lane.
struct Totals {
  double losses[kLanes] = {}, rights[kLanes] = {}, pairs[kLanes] = {};

  static void add(double (&sums)[kLanes], const Vec& values) {
    float lanes[kLanes];
    store_lanes(lanes, values);
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += static_cast<double>(lanes[lane]);
  }
};

template <bool kGradient>
void sum_pairs(Columns& lanes, int64_t widest, float margin_of_all, Totals& totals) {
  const Vec zero(0.0f), half(0.5f), one(1.0f), margin(margin_of_all);
  Vec loss(0.0f), right(0.0f), pairs(0.0f);
  int64_t chain = 0;
  const auto flush = [&] {
    totals.add(totals.losses, loss);
    totals.add(totals.rights, right);
    totals.add(totals.pairs, pairs);
    loss = right = pairs = zero;
    chain = 0;
  };
  for (int64_t i = 0; i + 1 < widest; ++i) {
    const Vec score_i = lanes.scores[i], rank_i = lanes.ranks[i];
    CompensatedSum gradient_i = lanes.gradients[i];
    for (int64_t j = i + 1; j < widest; ++j) {
      if (++chain > kLongestChain) flush();
      const Vec score_j = lanes.scores[j], rank_j = lanes.ranks[j];
      // Not at a tie, nor where the rank of one of them is NaN. Cut out, not multiplied: a score that is infinite or NaN
      // stays in its own pairs.
      const Lanes is_pair = different(rank_i, rank_j), i_is_better = greater(rank_j, rank_i);
      const Vec difference = select(i_is_better, score_i - score_j, score_j - score_i);
      const auto pair = ranking_pair(difference - margin);
      loss = add_where(is_pair, loss, pair.loss);
      pairs = add_where(is_pair, pairs, one);
      // Half each, so that equal scores, and those that cannot be compared, count half.
      right = add_where(is_pair & greater(difference, zero), right, half);
      right = add_where(is_pair & not_less(difference, zero), right, half);
      if constexpr (!kGradient) continue;
      const Vec slope = kept(is_pair, pair.slope), uphill = select(i_is_better, zero - slope, slope);
      gradient_i.add(uphill);
      lanes.gradients[j].subtract(uphill);
    }
    lanes.gradients[i] = gradient_i;
  }
  flush();
}

}  // namespace

void ranking(const RankingArguments& in, int64_t begin, int64_t end) {
  Columns side_by_side;
  std::vector<float> rows;
  const Vec not_a_number(NAN);
  const Span final = span_of(in.prompts, in.prompts.count - 1);
  const int64_t completions = final.flat + final.length;
  for (int64_t number = begin; number < end; ++number) {
    const Group group(in.prompts, number);
    const int64_t first = number * kLanes, widest = group.widest;
    side_by_side.make_room(widest);
    rows.resize(group.end - group.begin + kLanes);
    rows_to_lanes(group, in.scores + group.begin, completions - group.begin, side_by_side.scores.get());
    order_ranks(group, in.ranks, rows.data());
    // What is no completion has no order with anything.
    for_lanes(group.end - group.begin, [&](int64_t i, int64_t lanes) {
      const Lanes wanted = lanes_of(in.wanted + group.begin + i, lanes);
      store_lanes(rows.data() + i, select(wanted, load_lanes(rows.data() + i, lanes), not_a_number), lanes);
    });
    rows_to_lanes(group, rows.data(), static_cast<int64_t>(rows.size()), side_by_side.ranks.get());
    float lengths[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) lengths[lane] = static_cast<float>(group.length[lane]);
    for (int64_t k = 0; k < widest; ++k) {
      const Lanes inside = greater(load_lanes(lengths), Vec(static_cast<float>(k)));
      side_by_side.ranks[k] = select(inside, side_by_side.ranks[k], not_a_number);
      side_by_side.gradients[k] = {};
    }
    Totals totals;
    in.gradient ? sum_pairs<true>(side_by_side, widest, in.margin, totals)
                : sum_pairs<false>(side_by_side, widest, in.margin, totals);
    double shares[kLanes];
    float divisors[kLanes];  // without a pair the gradient is 0 already, as are the sums
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double pairs = std::max(1.0, totals.pairs[lane]);
      shares[lane] = 1.0 / pairs;
      divisors[lane] = static_cast<float>(pairs);
    }
    for (int64_t lane = 0; lane < group.lanes; ++lane) {
      in.counts[first + lane] = totals.pairs[lane] > 0;
      in.losses[first + lane] = totals.losses[lane] * shares[lane];
      in.accuracies[first + lane] = totals.rights[lane] * shares[lane];
    }
    if (!in.gradient) continue;
    // In place of the scores, which nobody needs any more.
    for (int64_t k = 0; k < widest; ++k) {
      side_by_side.scores[k] = side_by_side.gradients[k].total / load_lanes(divisors);
    }
    lanes_to_rows(group, side_by_side.scores.get(), in.gradient);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
