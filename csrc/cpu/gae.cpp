// Advantages from the last position of a sequence to its first, and their whitening.

#include <algorithm>
#include <bit>
#include <cstring>

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
// Masks are ragged, and a mispredicted branch costs more than the arithmetic, so nothing here asks what a mask says:
// masked inputs are 0, and a masked position hands on what it was given by its decay and by bit operations.
//
// Double costs nothing beside the chain's latency, and long sequences lose no digits.
constexpr int64_t kHalf = kLanes / 2;
typedef float Floats __attribute__((vector_size(kHalf * sizeof(float))));
typedef double Doubles __attribute__((vector_size(kHalf * sizeof(double))));
typedef uint32_t Bits __attribute__((vector_size(kHalf * sizeof(uint32_t))));

template <class Vector>
inline Vector load(const float* from) {
  Vector result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline void store(float* to, const Doubles& values) {
  const Floats rounded = __builtin_convertvector(values, Floats);
  std::memcpy(to, &rounded, sizeof rounded);
}

inline Doubles doubles(const Bits& floats) { return __builtin_convertvector(std::bit_cast<Floats>(floats), Doubles); }

// Positions of a sequence per lane, as many as the L1 cache holds with room for the inputs.
constexpr int64_t kTile = 64;

struct Tile {
  float rewards[kTile][kLanes];  // later the advantages
  float values[kTile][kLanes];   // later the returns
  float wanted[kTile][kLanes];   // all ones or zeros
};

struct Carry {
  Doubles advantage[2];
  Bits next_value[2];
};

void recurse(Tile& tile, int64_t first, double gamma, double gamma_lambda, Carry& carry) {
  const Bits one = std::bit_cast<Bits>(Floats{} + 1.0f);
  for (int64_t t = kTile - 1; t >= first; --t) {
    for (int half = 0; half < 2; ++half) {
      float* const rewards = tile.rewards[t] + half * kHalf;
      float* const values = tile.values[t] + half * kHalf;
      const Bits keep = load<Bits>(tile.wanted[t] + half * kHalf), value = load<Bits>(values);
      const Doubles kept = doubles(keep & one);
      Bits& next_value = carry.next_value[half];
      const Doubles delta =
          gae_delta(doubles(load<Bits>(rewards)), doubles(value), doubles(next_value & keep), gamma);
      carry.advantage[half] = gae_advantage(delta, kept * gamma_lambda + (1.0 - kept), carry.advantage[half]);
      next_value ^= (next_value ^ value) & keep;
      store(rewards, carry.advantage[half]);
      store(values, carry.advantage[half] + doubles(value));
    }
  }
}

// The tile before this one: so many short stretches of memory, read backwards, are more than hardware sees coming.
inline void prefetch(const float* from) {
  for (int64_t i = 0; i < kTile; i += 64 / sizeof(float)) __builtin_prefetch(from + i);
}

// A tile's rows hold its lanes one after another, before and after this.
void lanes_to_tile(float (&tile)[kTile][kLanes], const float (&lanes)[kLanes][kTile], int64_t first) {
  for (int64_t t = first / kLanes * kLanes; t < kTile; t += kLanes) {
    Vec square[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) square[lane] = load_lanes(lanes[lane] + t);
    transpose(square);
    for (int64_t i = 0; i < kLanes; ++i) store_lanes(tile[t + i], square[i]);
  }
}

void tile_to_lanes(float (&lanes)[kLanes][kTile], const float (&tile)[kTile][kLanes], int64_t first) {
  for (int64_t t = first / kLanes * kLanes; t < kTile; t += kLanes) {
    Vec square[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) square[i] = load_lanes(tile[t + i]);
    transpose(square);
    for (int64_t lane = 0; lane < kLanes; ++lane) store_lanes(lanes[lane] + t, square[lane]);
  }
}

}  // namespace

// With shaping, rewards are made tile by tile just before they are used, and the values in between never leave the
// cache. Sequences end together, at a tile's last position.
void gae(const GaeArguments& in, const KlShaping* shaping, int64_t begin, int64_t end) {
  Scratch scratch[2];
  Tile tile;
  // Before a sequence's first position, and in lanes without one, stands what was there: it moves nothing that is kept.
  float rewards[kLanes][kTile] = {}, values[kLanes][kTile] = {}, wanted[kLanes][kTile] = {};
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first_sequence = group * kLanes;
    const int64_t lanes = std::min(kLanes, in.sequences.count - first_sequence);
    Span spans[kLanes];
    int64_t scored[kLanes], longest = 0;
    float bootstraps[kLanes] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Span& span = spans[lane] = span_of(in.sequences, first_sequence + lane);
      scored[lane] = shaping ? last_wanted(in.wanted + span.flat, span.length) : -1;
      longest = std::max(longest, span.length);
      if (in.bootstrap) bootstraps[lane] = in.bootstrap[first_sequence + lane];
    }
    Carry carry{{}, {load<Bits>(bootstraps), load<Bits>(bootstraps + kHalf)}};
    for (int64_t from_end = 0; from_end < longest; from_end += kTile) {
      const int64_t first = std::max<int64_t>(0, kTile - (longest - from_end));
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const Span& span = spans[lane];
        const int64_t stop = span.length - from_end, count = std::min(kTile, stop), start = stop - count;
        if (count <= 0) continue;
        const int64_t flat = span.flat + start;
        const float* own_rewards;
        if (shaping) {
          const int64_t last = scored[lane] >= start && scored[lane] < stop ? scored[lane] - start : -1;
          shape_block(*shaping, span, in.wanted, start, count, last, first_sequence + lane, scratch);
          own_rewards = shaping->rewards + flat;
        } else {
          own_rewards = read(in.rewards, span.row, span.column + start, count, scratch[0]);
        }
        prefetch(in.advantages + flat - kTile);
        prefetch(in.returns + flat - kTile);
        prefetch(own_rewards - kTile);
        const float* own_values = read(in.values, span.row, span.column + start, count, scratch[1]);
        prefetch(own_values - kTile);
        for_lanes(count, [&](int64_t i, int64_t some) {
          const Lanes keep = lanes_of(in.wanted + flat + i, some);
          const int64_t at = kTile - count + i;
          store_lanes(wanted[lane] + at, select(keep, Vec(std::bit_cast<float>(-1)), Vec(0.0f)), some);
          store_lanes(rewards[lane] + at, kept(keep, load_lanes(own_rewards + i, some)), some);
          store_lanes(values[lane] + at, kept(keep, load_lanes(own_values + i, some)), some);
        });
      }
      lanes_to_tile(tile.rewards, rewards, first);
      lanes_to_tile(tile.values, values, first);
      lanes_to_tile(tile.wanted, wanted, first);
      recurse(tile, first, in.gamma, in.gamma * in.lambda, carry);
      tile_to_lanes(rewards, tile.rewards, first);
      tile_to_lanes(values, tile.values, first);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t stop = spans[lane].length - from_end, count = std::min(kTile, stop);
        const int64_t flat = spans[lane].flat + stop - count;
        for_lanes(count, [&](int64_t i, int64_t some) {
          const int64_t at = kTile - count + i;
          const Vec keep = load_lanes(wanted[lane] + at, some);
          store_lanes(in.advantages + flat + i, load_lanes(rewards[lane] + at, some) & keep, some);
          store_lanes(in.returns + flat + i, load_lanes(values[lane] + at, some) & keep, some);
        });
      }
    }
    for (int64_t lane = 0; in.moments && lane < lanes; ++lane) {
      Moments& moments = in.moments[first_sequence + lane] = {};
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
