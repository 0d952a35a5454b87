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

// A prompt per lane, completion by completion; lost is what additions to the gradients lost.
struct Lanes {
  int64_t capacity = 0;
  std::unique_ptr<float[]> scores, ranks, gradients, lost;

  void make_room(int64_t widest) {
    if (widest <= capacity) return;
    capacity = widest;
    for (auto* buffer : {&scores, &ranks, &gradients, &lost}) buffer->reset(new float[capacity * kLanes]);
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

void sum_pairs(Lanes& lanes, int64_t widest, float margin_of_all, Totals& totals) {
  const Vec zero(0.0f), half(0.5f), one(1.0f), minus_one(-1.0f), margin(margin_of_all);
  const auto gradient = [&](int64_t k) {
    return CompensatedSum{load_lanes(&lanes.gradients[k * kLanes]), load_lanes(&lanes.lost[k * kLanes])};
  };
  const auto keep = [&](int64_t k, const CompensatedSum& sum) {
    store_lanes(&lanes.gradients[k * kLanes], sum.total);
    store_lanes(&lanes.lost[k * kLanes], sum.lost);
  };
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
    const Vec score_i = load_lanes(&lanes.scores[i * kLanes]), rank_i = load_lanes(&lanes.ranks[i * kLanes]);
    CompensatedSum gradient_i = gradient(i);
    for (int64_t j = i + 1; j < widest; ++j) {
      if (++chain > kLongestChain) flush();
      const Vec rank_j = load_lanes(&lanes.ranks[j * kLanes]);
      // 1: i is ranked better; −1: j is; 0: a tie, or the rank of one of them is NaN.
      const Vec sign = where_greater(rank_j, rank_i, one, where_greater(rank_i, rank_j, minus_one, zero));
      // Cut out, not multiplied: a score that is infinite or NaN stays in its own pairs.
      const Vec is_pair = sign != zero;
      const Vec difference = sign * (score_i - load_lanes(&lanes.scores[j * kLanes]));
      const auto pair = ranking_pair(difference - margin);
      loss = loss + (pair.loss & is_pair);
      const Vec credit = where_greater(difference, zero, one, where_greater(zero, difference, zero, half));
      right = right + (credit & is_pair);
      pairs = pairs + (one & is_pair);
      const Vec slope = (pair.gradient * sign) & is_pair;
      gradient_i.add(slope);
      CompensatedSum gradient_j = gradient(j);
      gradient_j.add(zero - slope);
      keep(j, gradient_j);
    }
    keep(i, gradient_i);
  }
  flush();
}

}  // namespace

void ranking(const RankingArguments& in, int64_t begin, int64_t end) {
  Lanes side_by_side;
  std::vector<float> rows;
  const Vec zero(0.0f), not_a_number(NAN);
  for (int64_t number = begin; number < end; ++number) {
    const Group group(in.prompts, number);
    const int64_t first = number * kLanes, widest = group.widest;
    side_by_side.make_room(widest);
    rows.resize(group.end - group.begin);
    rows_to_lanes(group, in.scores + group.begin, side_by_side.scores.get());
    order_ranks(group, in.ranks, rows.data());
    // What is no completion has no order with anything.
    for_lanes(group.end - group.begin, [&](int64_t i, int64_t lanes) {
      const Vec wanted = lanes_of(in.wanted + group.begin + i, lanes);
      store_lanes(rows.data() + i, Vec::blendv(not_a_number, load_lanes(rows.data() + i, lanes), wanted), lanes);
    });
    rows_to_lanes(group, rows.data(), side_by_side.ranks.get());
    float lengths[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) lengths[lane] = static_cast<float>(group.length[lane]);
    for (int64_t k = 0; k < widest; ++k) {
      float* ranks = &side_by_side.ranks[k * kLanes];
      const Vec inside = Vec(static_cast<float>(k)) < load_lanes(lengths);
      store_lanes(ranks, Vec::blendv(not_a_number, load_lanes(ranks), inside));
      store_lanes(&side_by_side.gradients[k * kLanes], zero);
      store_lanes(&side_by_side.lost[k * kLanes], zero);
    }
    Totals totals;
    sum_pairs(side_by_side, widest, in.margin, totals);
    for (int64_t lane = 0; lane < group.lanes; ++lane) {
      const bool counts = totals.pairs[lane] > 0;
      in.counts[first + lane] = counts;
      in.losses[first + lane] = counts ? totals.losses[lane] / totals.pairs[lane] : 0;
      in.accuracies[first + lane] = counts ? totals.rights[lane] / totals.pairs[lane] : 0;
    }
    if (!in.gradient) continue;
    float divisors[kLanes];  // without a pair the gradient is 0 already
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      divisors[lane] = static_cast<float>(std::max(1.0, totals.pairs[lane]));
    }
    for (int64_t k = 0; k < widest; ++k) {
      float* gradient = &side_by_side.gradients[k * kLanes];
      store_lanes(gradient, load_lanes(gradient) / load_lanes(divisors));
    }
    lanes_to_rows(group, side_by_side.gradients.get(), in.gradient);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
