// Advantages from the last position of a sequence to its first, and their whitening.

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/rows.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

int64_t count_wanted(const uint8_t* wanted, int64_t length) {
  int64_t total = 0;
  // Bytes are added as bytes, which a vector does 64 at a time, in runs too short to overflow.
  for (int64_t start = 0; start < length; start += 128) {
    const int64_t stop = start + 128 < length ? start + 128 : length;
    uint8_t some = 0;
    for (int64_t i = start; i < stop; ++i) some = static_cast<uint8_t>(some + (wanted[i] != 0));
    total += some;
  }
  return total;
}

namespace {

// Of one block, in two passes over what the cache holds; masked entries are 0 already.
Moments moments_of(const float* values, const uint8_t* wanted, int64_t count) {
  Moments result;
  result.count = static_cast<double>(count_wanted(wanted, count));
  if (result.count == 0) return result;
  Vec total(0.0f), squares(0.0f), drift(0.0f);
  for_lanes(count, [&](int64_t i, int64_t lanes) { total = total + load_lanes(values + i, lanes); });
  // Of rounded additions, and rounded itself: what it is off by, the distances below add up to.
  const float mean = static_cast<float>(sum(total) / result.count);
  for_lanes(count, [&](int64_t i, int64_t lanes) {
    const Vec distance = kept(lanes_of(wanted + i, lanes), load_lanes(values + i, lanes) - Vec(mean));
    squares = fma(distance, distance, squares);
    drift = drift + distance;
  });
  const double offset = sum(drift) / result.count;
  result.mean = mean + offset;
  result.squares = sum(squares) - offset * offset * result.count;
  return result;
}

// One sequence per lane: the recursion waits for its own last result, so sequences side by side cost no more than one.
// Masks are ragged, and a mispredicted branch costs more than the arithmetic, so nothing here asks what a mask says: a
// masked position keeps what was carried to it, and its own results are cut out at the end.
//
// Double costs nothing beside the chain's latency, and long sequences lose no digits.

// Positions of a sequence per lane, as many as the L1 cache holds with room for the inputs.
constexpr int64_t kTile = 64;

struct Tile {
  Vec rewards[kTile];  // later the advantages
  Vec values[kTile];   // later the returns
  Lanes wanted[kTile];
};

struct Carry {
  WideVec advantage, next_value;
};

void recurse(Tile& tile, int64_t first, const Doubles& gamma, const Doubles& gamma_lambda, Carry& carry) {
  for (int64_t t = kTile - 1; t >= first; --t) {
    const WideVec reward = widened(tile.rewards[t]), value = widened(tile.values[t]);
    WideVec target;
    for (int half = 0; half < 2; ++half) {
      Doubles &after = carry.advantage.half[half], &next_value = carry.next_value.half[half];
      const Doubles delta = gae_delta(reward.half[half], value.half[half], next_value, gamma);
      after = select(tile.wanted[t], half, gae_advantage(delta, gamma_lambda, after), after);
      next_value = select(tile.wanted[t], half, value.half[half], next_value);
      target.half[half] = after + value.half[half];
    }
    tile.rewards[t] = rounded(carry.advantage);
    tile.values[t] = rounded(target);
  }
}

// The tile before this one: so many short stretches of memory, read backwards, are more than hardware sees coming.
inline void prefetch(const float* from) {
  for (int64_t i = 0; i < kTile; i += 64 / sizeof(float)) __builtin_prefetch(from + i);
}

// A lane's stretch of a tile, of which the last `count` positions are there. Where those are all, and stay where they
// are, it is used in place; the others' is made here.
template <class T>
struct Stretch {
  T values[kTile] = {};

  const T* of(const T* from, int64_t count, bool stays = true) {
    if (count == kTile && stays) return from;
    std::memcpy(values + kTile - count, from, count * sizeof(T));
    return values;
  }
};

void rows_to_tile(const float* const (&rows)[kLanes], int64_t first, Vec (&tile)[kTile]) {
  for (int64_t t = first / kLanes * kLanes; t < kTile; t += kLanes) {
    Vec square[kLanes];
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < kLanes; ++lane) square[lane] = load_lanes(rows[lane] + t);
    transpose(square, tile + t);
  }
}

// What is masked becomes 0.
void tile_to_rows(const Vec (&tile)[kTile], const uint8_t* const (&wanted)[kLanes], int64_t first,
                  float* const (&rows)[kLanes]) {
  for (int64_t t = first / kLanes * kLanes; t < kTile; t += kLanes) {
    Vec square[kLanes];
    transpose(tile + t, square);
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      store_lanes(rows[lane] + t, kept(lanes_of(wanted[lane] + t), square[lane]));
    }
  }
}

// What a thread needs for a group of sequences, beside the tile.
struct Workspace {
  Scratch scratch[2];
  Stretch<float> rewards[kLanes], values[kLanes], advantages[kLanes], returns[kLanes];
  Stretch<uint8_t> wanted[kLanes];
};

}  // namespace

// With shaping, rewards are made tile by tile just before they are used, and the values in between never leave the
// cache. Sequences end together, at a tile's last position. Before a sequence's first position, and in lanes without
// one, stands what was there: nothing of it is wanted.
void gae(const GaeArguments& in, const KlShaping* shaping, int64_t begin, int64_t end) {
  const auto work = std::make_unique<Workspace>();
  Tile tile;
  const Doubles gamma(in.gamma), gamma_lambda(in.gamma * in.lambda);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first_sequence = group * kLanes;
    const int64_t lanes = std::min(kLanes, in.sequences.count - first_sequence);
    Span spans[kLanes];
    int64_t sequences[kLanes], scored[kLanes], longest = 0;
    float bootstraps[kLanes] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) {
      sequences[lane] = in.sequences.at(first_sequence + lane);
      const Span& span = spans[lane] = span_of(in.sequences, sequences[lane]);
      scored[lane] = shaping ? last_wanted(in.wanted + span.flat, span.length) : -1;
      longest = std::max(longest, span.length);
      if (in.bootstrap) bootstraps[lane] = in.bootstrap[sequences[lane]];
    }
    Carry carry{widened(Vec(0.0f)), widened(load_lanes(bootstraps))};
    for (int64_t from_end = 0; from_end < longest; from_end += kTile) {
      const int64_t first = std::max<int64_t>(0, kTile - (longest - from_end));
      const float *rewards[kLanes], *values[kLanes];
      const uint8_t* wanted[kLanes];
      float *advantages[kLanes], *returns[kLanes];
      int64_t counts[kLanes] = {};
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        // Unless the whole stretch is there, below.
        rewards[lane] = work->rewards[lane].values;
        values[lane] = work->values[lane].values;
        wanted[lane] = work->wanted[lane].values;
        advantages[lane] = work->advantages[lane].values;
        returns[lane] = work->returns[lane].values;
        const Span& span = spans[lane];
        const int64_t stop = lane < lanes ? span.length - from_end : 0, count = std::min(kTile, stop);
        if (count < kTile) std::memset(work->wanted[lane].values, 0, kTile);
        if (count <= 0) continue;
        counts[lane] = count;
        const int64_t start = stop - count, flat = span.flat + start;
        const float* own_rewards;
        if (shaping) {
          const int64_t last = scored[lane] >= start && scored[lane] < stop ? scored[lane] - start : -1;
          shape_block(*shaping, span, in.wanted, start, count, last, sequences[lane], work->scratch);
          own_rewards = shaping->rewards + flat;
        } else {
          own_rewards = read(in.rewards, span.row, span.column + start, count, work->scratch[0]);
        }
        const float* own_values = read(in.values, span.row, span.column + start, count, work->scratch[1]);
        prefetch(in.advantages + flat - kTile);
        prefetch(in.returns + flat - kTile);
        prefetch(own_rewards - kTile);
        prefetch(own_values - kTile);
        rewards[lane] = work->rewards[lane].of(own_rewards, count, own_rewards != work->scratch[0].values);
        values[lane] = work->values[lane].of(own_values, count, own_values != work->scratch[1].values);
        wanted[lane] = work->wanted[lane].of(in.wanted + flat, count);
        if (count < kTile) continue;
        advantages[lane] = in.advantages + flat;
        returns[lane] = in.returns + flat;
      }
      rows_to_tile(rewards, first, tile.rewards);
      rows_to_tile(values, first, tile.values);
      lanes_by_position(wanted, first, tile.wanted);
      recurse(tile, first, gamma, gamma_lambda, carry);
      tile_to_rows(tile.rewards, wanted, first, advantages);
      tile_to_rows(tile.values, wanted, first, returns);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        if (counts[lane] == kTile) continue;
        const int64_t count = counts[lane], flat = spans[lane].flat, at = kTile - count;
        std::memcpy(in.advantages + flat, advantages[lane] + at, count * sizeof(float));
        std::memcpy(in.returns + flat, returns[lane] + at, count * sizeof(float));
      }
    }
    for (int64_t lane = 0; in.moments && lane < lanes; ++lane) {
      Moments& moments = in.moments[sequences[lane]] = {};
      for (int64_t t = 0; t < spans[lane].length; t += kRowBlock) {
        const int64_t flat = spans[lane].flat + t;
        merge(moments, moments_of(in.advantages + flat, in.wanted + flat, std::min(kRowBlock, spans[lane].length - t)));
      }
    }
  }
}

void whiten(float* advantages, const uint8_t* wanted, double mean, double scale, int64_t begin, int64_t end) {
  // The mean in two parts: advantages far from 0 against their spread would lose digits to its rounding.
  const float high = static_cast<float>(mean), low = static_cast<float>(mean - high);
  for_lanes(end - begin, [&](int64_t i, int64_t lanes) {
    float* at = advantages + begin + i;
    const Vec centred = (load_lanes(at, lanes) - Vec(high)) - Vec(low);
    store_lanes(at, kept(lanes_of(wanted + begin + i, lanes), centred * Vec(static_cast<float>(scale))), lanes);
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
