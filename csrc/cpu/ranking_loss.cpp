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

// float32 has every rank below this as it is.
constexpr float kExactRank = 16777216.0f;

// Where a group's prompts lie: one behind another.
struct Group {
  int64_t start[kLanes] = {}, length[kLanes] = {}, lanes, widest = 0;

  Group(const Sequences& prompts, int64_t group) {
    const int64_t first = group * kLanes;
    lanes = std::min(kLanes, prompts.count - first);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Span span = span_of(prompts, first + lane);
      start[lane] = span.flat;
      length[lane] = span.length;
      widest = std::max(widest, span.length);
    }
  }
};

// From a row per prompt to a lane per prompt: read(lane, k, count) gives the count completions from the k-th on, which may
// be none.
template <class Read>
void rows_to_lanes(const Group& group, Vec* lanes, Read&& read) {
  for (int64_t k = 0; k < group.widest; k += kLanes) {
    Vec square[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      square[lane] = read(lane, k, std::clamp<int64_t>(group.length[lane] - k, 0, kLanes));
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

// A prompt's ranks in an order that float32 can tell: how many of them are smaller.
void order_ranks(const int64_t* ranks, int64_t length, float* result) {
  for (int64_t k = 0; k < length; ++k) {
    int64_t smaller_ones = 0;
    for (int64_t other = 0; other < length; ++other) smaller_ones += ranks[other] < ranks[k];
    result[k] = static_cast<float>(smaller_ones);
  }
}

// The ranks, and NaN for what is no completion: that has no order with anything.
void ranks_to_lanes(const RankingArguments& in, const Group& group, Vec* lanes) {
  const auto completions = [&](int64_t lane, int64_t k, int64_t count, const Vec& ranks) {
    return select(lanes_of(in.wanted + group.start[lane] + k, count), ranks, Vec(NAN));
  };
  Vec farthest(0.0f);
  rows_to_lanes(group, lanes, [&](int64_t lane, int64_t k, int64_t count) {
    const Vec ranks = load_integers(in.ranks + group.start[lane] + k, count);
    farthest = larger(ranks.abs(), farthest);
    return completions(lane, k, count, ranks);
  });
  if (count(not_less(farthest, Vec(kExactRank))) == 0) return;
  // Some float32 may be that of several ranks. Only their order matters.
  std::vector<float> ordered(group.widest * kLanes);
  for (int64_t lane = 0; lane < group.lanes; ++lane) {
    order_ranks(in.ranks + group.start[lane], group.length[lane], ordered.data() + lane * group.widest);
  }
  rows_to_lanes(group, lanes, [&](int64_t lane, int64_t k, int64_t count) {
    return completions(lane, k, count, load_lanes(ordered.data() + lane * group.widest + k, count));
  });
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

// Of float32 additions, or factors, that follow on one another. More lose digits, overflow, and a float32 counts to 2^24
// only.
constexpr int64_t kLongestChain = 64;

// Per lane.
struct Totals {
  WideVec losses, rights, pairs;
};

template <bool kGradient>
void sum_pairs(Columns& lanes, int64_t widest, float margin_of_all, Totals& totals) {
  const Vec zero(0.0f), half(0.5f), one(1.0f), margin(margin_of_all);
  for (int64_t k = 0; k < widest; ++k) lanes.gradients[k] = {};
  Vec excess(0.0f), product(0.0f), right(0.0f), pairs(0.0f);
  int64_t chain = 0;
  const auto flush = [&] {
    const WideVec products = widened(product);
    totals.losses += widened(excess);
    totals.losses += WideVec{{products.half[0].log1p(), products.half[1].log1p()}};
    totals.rights += widened(right);
    totals.pairs += widened(pairs);
    excess = product = right = pairs = zero;
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
      const Vec difference = flipped(i_is_better, score_j - score_i);
      const auto pair = ranking_pair(difference - margin);
      excess = add_where(is_pair, excess, pair.excess);
      product = with_tail(product, kept(is_pair, pair.tail));
      pairs = add_where(is_pair, pairs, one);
      // Half each, so that equal scores, and those that cannot be compared, count half.
      right = add_where(is_pair & greater(difference, zero), right, half);
      right = add_where(is_pair & not_less(difference, zero), right, half);
      if constexpr (!kGradient) continue;
      const Vec uphill = flipped(i_is_better, kept(is_pair, pair.slope));
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
  for (int64_t number = begin; number < end; ++number) {
    const Group group(in.prompts, number);
    side_by_side.make_room(group.widest);
    rows_to_lanes(group, side_by_side.scores.get(), [&](int64_t lane, int64_t k, int64_t count) {
      return load_lanes(in.scores + group.start[lane] + k, count);
    });
    ranks_to_lanes(in, group, side_by_side.ranks.get());
    Totals totals;
    in.gradient ? sum_pairs<true>(side_by_side, group.widest, in.margin, totals)
                : sum_pairs<false>(side_by_side, group.widest, in.margin, totals);
    // Without a pair the sums and the gradient are 0 already.
    const auto at_least_1 = [](const Doubles& pairs) { return at::vec::maximum(pairs, Doubles(1.0)); };
    const WideVec divisors{{at_least_1(totals.pairs.half[0]), at_least_1(totals.pairs.half[1])}};
    const Vec divisor = rounded(divisors);
    in.losses[number] = sum(totals.losses / divisors);
    in.accuracies[number] = sum(totals.rights / divisors);
    in.counts[number] = count(greater(rounded(totals.pairs), Vec(0.0f)));
    if (!in.gradient) continue;
    // In place of the scores, which nobody needs any more.
    for (int64_t k = 0; k < group.widest; ++k) side_by_side.scores[k] = side_by_side.gradients[k].total / divisor;
    lanes_to_rows(group, side_by_side.scores.get(), in.gradient);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
