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
// be none. Lanes have room for whole squares.
template <class Read>
void rows_to_lanes(const Group& group, Vec* lanes, Read&& read) {
  for (int64_t k = 0; k < group.widest; k += kLanes) {
    Vec square[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      square[lane] = read(lane, k, std::clamp<int64_t>(group.length[lane] - k, 0, kLanes));
    }
    transpose(square, lanes + k);
  }
}

void lanes_to_rows(const Group& group, const Vec* lanes, float* rows) {
  for (int64_t k = 0; k < group.widest; k += kLanes) {
    Vec square[kLanes];
    transpose(lanes + k, square);
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
    capacity = (widest + kLanes - 1) / kLanes * kLanes;
    scores.reset(new Vec[capacity]);
    ranks.reset(new Vec[capacity]);
    gradients.reset(new CompensatedSum[capacity]);
  }
};

// Of float32 additions, or factors, that follow on one another. More lose digits, overflow, and a float32 counts to 2^24
// only.
constexpr int64_t kLongestChain = 64;

struct Chain {
  int64_t length = 0;
  Vec shortfall{0.0f}, product{0.0f};
  Tally pairs, above, below;
};

// Per lane.
struct Totals {
  WideVec losses, rights, pairs;

  void add(const Chain& chain) {
    const WideVec products = widened(chain.product);
    losses += widened(Vec(0.0f) - chain.shortfall);
    losses += WideVec{{products.half[0].log1p(), products.half[1].log1p()}};
    // What is no pair was counted above. Scores that are equal, or cannot be compared, are neither: they count half.
    const Vec pair_count = chain.pairs.value(), no_pairs = Vec(static_cast<float>(chain.length)) - pair_count;
    const Vec surplus = chain.above.value() - no_pairs - chain.below.value();
    rights += widened(Vec(0.5f) * (pair_count + surplus));
    pairs += widened(pair_count);
  }
};

// The pairs of completion i with those from begin to end. What is summed is copied, for the compiler to keep it in
// registers.
template <bool kGradient>
void add_pairs(Columns& lanes, int64_t i, int64_t begin, int64_t end, const Vec& margin, Chain& chain) {
  const Vec zero(0.0f), infinity(INFINITY), score_i = lanes.scores[i], rank_i = lanes.ranks[i];
  CompensatedSum gradient_i = lanes.gradients[i];
  Vec shortfall = chain.shortfall, product = chain.product;
  Tally pairs = chain.pairs, above = chain.above, below = chain.below;
  for (int64_t j = begin; j < end; ++j) {
    // Not at a tie, nor where the rank of one of them is NaN. Those are infinitely far in the right order, which adds
    // nothing; they are cut out, not multiplied: a score that is infinite or NaN stays in its own pairs.
    const Lanes is_pair = different(rank_i, lanes.ranks[j]);
    const Vec sign = rank_i - lanes.ranks[j];
    const Vec difference = select(is_pair, flipped(sign, lanes.scores[j] - score_i), infinity);
    const auto pair = ranking_pair(difference - margin);
    shortfall = shortfall + pair.shortfall;
    product = with_tail(product, pair.tail);
    pairs.add(is_pair);
    above.add(greater(difference, zero));
    below.add(greater(zero, difference));
    if constexpr (!kGradient) continue;
    const Vec uphill = flipped(sign, pair.slope);
    gradient_i.add(uphill);
    lanes.gradients[j].subtract(uphill);
  }
  lanes.gradients[i] = gradient_i;
  chain = {chain.length + end - begin, shortfall, product, pairs, above, below};
}

template <bool kGradient>
void sum_pairs(Columns& lanes, int64_t widest, const Vec& margin, Totals& totals) {
  for (int64_t k = 0; k < widest; ++k) lanes.gradients[k] = {};
  Chain chain;
  for (int64_t i = 0; i + 1 < widest; ++i) {
    for (int64_t j = i + 1, end; j < widest; j = end) {
      end = std::min(widest, j + kLongestChain - chain.length);
      add_pairs<kGradient>(lanes, i, j, end, margin, chain);
      if (chain.length < kLongestChain) continue;
      totals.add(chain);
      chain = {};
    }
  }
  totals.add(chain);
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
    in.gradient ? sum_pairs<true>(side_by_side, group.widest, Vec(in.margin), totals)
                : sum_pairs<false>(side_by_side, group.widest, Vec(in.margin), totals);
    // Without a pair the sums and the gradient are 0 already.
    const auto at_least_1 = [](const Doubles& pairs) { return at::vec::maximum(pairs, Doubles(1.0)); };
    const WideVec divisors{{at_least_1(totals.pairs.half[0]), at_least_1(totals.pairs.half[1])}};
    in.losses[number] = sum(totals.losses / divisors);
    in.accuracies[number] = sum(totals.rights / divisors);
    in.counts[number] = count(greater(rounded(totals.pairs), Vec(0.0f)));
    if (!in.gradient) continue;
    const Doubles prompts(static_cast<double>(in.prompts.count));
    const Vec divisor = rounded(WideVec{{divisors.half[0] * prompts, divisors.half[1] * prompts}});
    // In place of the scores, which nobody needs any more.
    for (int64_t k = 0; k < group.widest; ++k) side_by_side.scores[k] = side_by_side.gradients[k].total / divisor;
    lanes_to_rows(group, side_by_side.scores.get(), in.gradient);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
