// The ranking loss and its gradient, a vector's worth of prompts at a time: one prompt per lane, so that no pair waits
// for another and nothing of size (K, K) is held.

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/rows.h"
#include "cpu/table.h"
#include "cpu/vec/ranking_loss.h"
#include "rlhf_kernels/ranking_loss.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

namespace {

// float32 holds every integer below this exactly.
constexpr float kExactRank = 16777216.0f;

// Where the completions of a group's prompts lie: prompt after prompt.
struct Group {
  int64_t first, count = 0, lanes, widest = 0;
  int64_t start[kLanes], length[kLanes] = {};

  Group(const Sequences& prompts, int64_t group) {
    const int64_t number = group * kLanes;
    lanes = std::min(kLanes, prompts.count - number);
    first = span_of(prompts, number).flat;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Span span = span_of(prompts, number + lane);
      start[lane] = span.flat - first;
      length[lane] = span.length;
      widest = std::max(widest, span.length);
      count += span.length;
    }
    std::fill(start + lanes, start + kLanes, count);
  }
};

// From a row per prompt, row after row, to a lane per prompt, by transposing squares. Rows are read past their ends.
void rows_to_lanes(const Group& group, const float* rows, Vec* lanes) {
  for (int64_t k = 0; k < group.widest; k += kLanes) {
    Vec square[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) square[lane] = Vec::loadu(rows + group.start[lane] + k);
    transpose(square, lanes + k);
  }
}

// And back. A row is written past its end, over the beginning of the next one, which is written later: squares go from the
// last to the first.
void lanes_to_rows(const Group& group, const Vec* lanes, float* rows) {
  for (int64_t k = (group.widest + kLanes - 1) / kLanes * kLanes - kLanes; k >= 0; k -= kLanes) {
    Vec square[kLanes];
    transpose(lanes + k, square);
    for (int64_t lane = 0; lane < group.lanes; ++lane) {
      if (k < group.length[lane]) square[lane].store(rows + group.start[lane] + k);
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

// The ranks as rows, with NaN for what the mask leaves out: NaN compares with nothing, so it is in no pair.
void read_ranks(const RankingArguments& in, const Group& group, float* rows) {
  const int64_t* ranks = in.ranks + group.first;
  Vec farthest(0.0f);
  for_lanes(group.count, [&](int64_t i, int64_t lanes) {
    const Vec values = load_integers(ranks + i, lanes);
    farthest = larger(values.abs(), farthest);
    store_lanes(rows + i, values, lanes);
  });
  if (count(not_less(farthest, Vec(kExactRank)))) {
    // Several large ranks may round to one float32. Only their order matters, so they are numbered anew.
    for (int64_t lane = 0; lane < group.lanes; ++lane) {
      order_ranks(ranks + group.start[lane], group.length[lane], rows + group.start[lane]);
    }
  }
  if (!in.wanted) return;
  for_lanes(group.count, [&](int64_t i, int64_t lanes) {
    const Lanes exist = lanes_of(in.wanted + group.first + i, lanes);
    store_lanes(rows + i, select(exist, load_lanes(rows + i, lanes), Vec(NAN)), lanes);
  });
}

// How many pairs are summed, or multiplied, in float32 before the result goes into a double. More would lose digits or
// overflow.
constexpr int64_t kPairBlock = 64;

// A group's rows; the same with a prompt per lane, completion by completion; and a block of their pairs.
struct Columns {
  int64_t capacity = 0;
  std::unique_ptr<float[]> score_rows, rank_rows;
  std::unique_ptr<Vec[]> scores, ranks;
  std::unique_ptr<SplitSum[]> gradients;
  Vec xs[kPairBlock], tails[kPairBlock];

  void make_room(int64_t widest) {
    if (widest <= capacity) return;
    capacity = (widest + kLanes - 1) / kLanes * kLanes;
    score_rows.reset(new float[(kLanes + 1) * capacity]());
    rank_rows.reset(new float[(kLanes + 1) * capacity]());
    scores.reset(new Vec[capacity]);
    ranks.reset(new Vec[capacity]);
    gradients.reset(new SplitSum[capacity]);
  }
};

// All pairs, i before j, in one list: a loop over j for every i would be short most times.
struct Pair {
  int64_t i = 0, j = 1;

  void next(int64_t widest) {
    const int64_t last = j + 1 == widest;
    i += last;
    j = last ? i + 1 : j + 1;
  }
};

// What a block of pairs adds up to, per lane.
struct Block {
  int64_t length;
  Vec differences, product, order;  // the differences of pairs that fall short
  Tally pairs, short_pairs;
};

// Per lane.
struct Totals {
  WideVec losses, rights, pairs;

  void add(const Block& block, double margin) {
    // Two completions that are no pair count as if in order, and are taken off later. Equal scores, and NaN, count half.
    const Vec pair_count = block.pairs.value(), no_pairs = Vec(static_cast<float>(block.length)) - pair_count;
    rights += widened(Vec(0.5f) * (pair_count + (block.order - no_pairs)));
    pairs += widened(pair_count);
    const WideVec differences = widened(block.differences), short_pairs = widened(block.short_pairs.value());
    const Doubles margins(margin);
    losses = losses - WideVec{{sum_below_zero(differences.half[0], short_pairs.half[0], margins),
                               sum_below_zero(differences.half[1], short_pairs.half[1], margins)}};
    // Last, because gcc keeps nothing in registers across a call.
    const WideVec products = widened(block.product);
    losses += WideVec{{products.half[0].log1p(), products.half[1].log1p()}};
  }
};

// One loop for what comes before the exponentials, one for them and one for what comes after. Within a pair each step waits
// for the one before; several pairs at the same step do not wait for each other.
template <bool kGradient, bool kMargin>
Block add_block(Columns& lanes, int64_t widest, int64_t length, const Vec& margin, Pair& pair) {
  const Vec zero(0.0f), infinity(INFINITY);
  const Pair first = pair;
  Vec differences = zero, product = zero, order = zero;
  Tally pairs, short_pairs;
  for (int64_t n = 0; n < length; ++n, pair.next(widest)) {
    const Vec rank_i = lanes.ranks[pair.i], rank_j = lanes.ranks[pair.j];
    // Ties, and NaN ranks, are no pairs: they are treated as infinitely far in the right order, which adds nothing. They are
    // selected away, not multiplied by 0, so that an infinite or NaN score affects its own pairs only.
    const Lanes is_pair = different(rank_i, rank_j);
    const Vec downhill = flipped(rank_i - rank_j, lanes.scores[pair.j] - lanes.scores[pair.i]);
    const Vec difference = select(is_pair, downhill, infinity), x = difference - margin;
    pairs.add(is_pair);
    order = order + signum(difference);
    const Lanes is_short = not_less(zero, x);  // NaN too
    differences = add_where(is_short, differences, difference);
    if constexpr (kMargin) short_pairs.add(is_short);
    lanes.xs[n] = x;
  }
  for (int64_t n = 0; n < length; ++n) {
    lanes.tails[n] = pair_tail(lanes.xs[n]);
    product = with_tail(product, lanes.tails[n]);
  }
  if constexpr (kGradient) {
    const Vec grid = SplitSum::grid_for(widest);
    int64_t n = 0;  // here sums are kept in registers as long as i stays
    for (int64_t i = first.i, begin = first.j; n < length; ++i, begin = i + 1) {
      const Vec rank_i = lanes.ranks[i];
      SplitSum gradient_i = lanes.gradients[i];
      const int64_t end = std::min(widest, begin + length - n);
      for (int64_t j = begin; j < end; ++j, ++n) {
        const Vec uphill = flipped(rank_i - lanes.ranks[j], pair_slope(lanes.xs[n], lanes.tails[n]));
        const SplitSum term(uphill, grid);
        gradient_i += term;
        lanes.gradients[j] -= term;
      }
      lanes.gradients[i] = gradient_i;
    }
  }
  return {length, differences, product, order, pairs, short_pairs};
}

template <bool kGradient, bool kMargin>
void sum_pairs(Columns& lanes, int64_t widest, float margin, Totals& totals) {
  for (int64_t k = 0; k < widest; ++k) lanes.gradients[k] = {};
  Pair pair;
  int64_t left = widest * (widest - 1) / 2;
  do {
    const int64_t length = std::min(left, kPairBlock);
    totals.add(add_block<kGradient, kMargin>(lanes, widest, length, Vec(margin), pair), margin);
    left -= length;
  } while (left > 0);
}

}  // namespace

void ranking(const RankingArguments& in, int64_t begin, int64_t end) {
  Columns lanes;
  for (int64_t number = begin; number < end; ++number) {
    const Group group(in.prompts, number);
    lanes.make_room(group.widest);
    copy_as_float(in.scores, in.dtype, group.first, group.count, lanes.score_rows.get());
    read_ranks(in, group, lanes.rank_rows.get());
    rows_to_lanes(group, lanes.score_rows.get(), lanes.scores.get());
    rows_to_lanes(group, lanes.rank_rows.get(), lanes.ranks.get());
    const Vec lengths = load_integers(group.length, kLanes);
    for (int64_t k = 0; k < group.widest; ++k) {
      lanes.ranks[k] = select(greater(lengths, Vec(static_cast<float>(k))), lanes.ranks[k], Vec(NAN));
    }
    Totals totals;
    const auto sum_all = in.gradient ? in.margin ? sum_pairs<true, true> : sum_pairs<true, false>
                                     : in.margin ? sum_pairs<false, true> : sum_pairs<false, false>;
    sum_all(lanes, group.widest, in.margin, totals);
    // Without a pair the sums and the gradient are 0 already.
    const auto share = [](const Doubles& pairs) { return Doubles(1.0) / at::vec::maximum(pairs, Doubles(1.0)); };
    const WideVec shares{{share(totals.pairs.half[0]), share(totals.pairs.half[1])}};
    in.losses[number] = sum(totals.losses * shares);
    in.accuracies[number] = sum(totals.rights * shares);
    in.counts[number] = count(greater(rounded(totals.pairs), Vec(0.0f)));
    if (!in.gradient) continue;
    const Doubles mean(1.0 / static_cast<double>(in.prompts.count));
    const WideVec factors = shares * WideVec{{mean, mean}};
    const Vec factor = rounded(factors), lost = rounded(factors - widened(factor));
    // In place of the scores, which nobody needs any more.
    for (int64_t k = 0; k < group.widest; ++k) lanes.scores[k] = lanes.gradients[k].times(factor, lost);
    lanes_to_rows(group, lanes.scores.get(), lanes.score_rows.get());
    std::copy_n(lanes.score_rows.get(), group.count, in.gradient + group.first);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
