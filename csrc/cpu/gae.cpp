// Advantages from the last position of a sequence to its first, and their whitening.

#include <algorithm>
#include <utility>

#include "cpu/kl_reward.h"
#include "cpu/rows.h"
#include "cpu/table.h"
#include "cpu/vec/gae.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

namespace {

// The moments of one block of advantages, read twice while it is in the cache. Masked entries are 0 already.
Moments moments_of(const float* values, const uint8_t* wanted, int64_t count) {
  Moments result;
  result.count = static_cast<double>(count_wanted(wanted, count));
  if (result.count == 0) return result;
  Vec total(0.0f), squares(0.0f), drift(0.0f);
  for_lanes(count, [&](int64_t i, int64_t lanes) { total = total + load_lanes(values + i, lanes); });
  // This mean is rounded. The distances to it, summed below, say by how much it is off, which is then put right.
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

// What comes to a position from its right: the advantage and the value of the next one that counts.
struct Carry {
  double advantage;
  float value;
};

// The recursion over a vector's worth of positions at a time. Unmasked positions are first moved side by side, so that
// masked ones are skipped. One after another, each step would wait for the one before it. So the sums within the vector
// are made by a parallel scan, in steps that double their reach (Hillis and Steele 1986), and what comes from the right is
// added last. All in double: long sequences lose no digits.
class Recursion {
 public:
  Recursion(double gamma, double lambda) : gamma_(gamma) {
    double power = 1;
    std::fill(powers_ + kLanes, powers_ + 2 * kLanes, power);
    for (int64_t i = kLanes; i-- > 0; powers_[i] = power) power *= gamma * lambda;
    for (int i = 0; i < 3; ++i) steps_[i] = Doubles(powers_[kLanes - (1 << i)]);
  }

  // Advantages and returns of a block; masked positions become 0. past_caches: results that are aligned to whole vectors
  // are written past the caches.
  void operator()(const float* rewards, const float* values, const uint8_t* wanted, int64_t length, Carry& carry,
                  bool past_caches, float* advantages, float* returns) const {
    const Pointers at{rewards, values, wanted, advantages, returns,
                      past_caches && is_aligned(advantages) && is_aligned(returns)};
    State right{Doubles(carry.advantage), Vec(carry.value)};
    int64_t start = length;
    while (start % (kVectors * kLanes) > 0) {
      const int64_t stop = start;
      start = (stop - 1) / kLanes * kLanes;
      right = take(at, start, stop - start, right, std::make_integer_sequence<int, 1>());
    }
    while (start > 0) {
      start -= kVectors * kLanes;
      right = take(at, start, kLanes, right, std::make_integer_sequence<int, kVectors>());
    }
    double all[kHalf];
    float all_values[kLanes];
    right.advantage.store(all);
    right.value.store(all_values);
    carry = {all[0], all_values[0]};
  }

 private:
  struct Pointers {
    const float *rewards, *values;
    const uint8_t* wanted;
    float *advantages, *returns;
    bool past_caches;
  };

  // A Carry in vectors: the advantage in every lane, the value in the first lane only. Its other lanes mean nothing.
  struct State {
    Doubles advantage;
    Vec value;
  };

  // Several neighbouring vectors, one step for all of them before the next step: their scans do not wait for each other.
  template <int... n>
  [[gnu::always_inline]] State take(const Pointers& at, int64_t start, int64_t lanes, State right,
                                    std::integer_sequence<int, n...>) const {
    constexpr int last = sizeof...(n) - 1;
    const Lanes keep[] = {lanes_of(at.wanted + start + n * kLanes, lanes)...};
    const int64_t found[] = {count(keep[n])...};
    if ((found[n] + ...) == 0) {
      (store(at, start + n * kLanes, lanes, Vec(0.0f), Vec(0.0f)), ...);
      return right;
    }
    const Vec values[] = {load_lanes(at.values + start + n * kLanes, lanes)...};
    // The unmasked values of each vector, followed by the first value of the vector to its right.
    Vec together[] = {values[n]..., right.value};
    const auto move = [&](int i) { together[i] = compressed(keep[i], values[i], first_everywhere(together[i + 1])); };
    (move(last - n), ...);
    const WideVec value[] = {widened(together[n])..., widened(right.value)};
    WideVec sum[] = {delta(compressed(keep[n], load_lanes(at.rewards + start + n * kLanes, lanes), Vec(0.0f)), value[n],
                           value[n + 1].half[0], first_lanes(found[n]))...};
    ((sum[n] = reaching<1>(sum[n])), ...);
    if constexpr (kHalf > 2) ((sum[n] = reaching<2>(sum[n])), ...);
    if constexpr (kHalf > 4) ((sum[n] = reaching<4>(sum[n])), ...);
    const Doubles far = Doubles::loadu(powers_ + kHalf);
    ((sum[n].half[0] = gae_advantage(sum[n].half[0], far, first_everywhere(sum[n].half[1]))), ...);
    const auto finish = [&](int i) {
      const double* powers = powers_ + kLanes - found[i];  // from the one that is the whole way to the right, down
      const WideVec advantage{{gae_advantage(sum[i].half[0], Doubles::loadu(powers), right.advantage),
                               gae_advantage(sum[i].half[1], Doubles::loadu(powers + kHalf), right.advantage)}};
      right.advantage = first_everywhere(advantage.half[0]);
      const Vec apart = expanded(keep[i], rounded(advantage));
      store(at, start + i * kLanes, lanes, apart, kept(keep[i], apart + values[i]));
    };
    (finish(last - n), ...);
    return {right.advantage, together[0]};
  }

  // δ of each position, and 0 in lanes beyond the last position.
  WideVec delta(const Vec& rewards, const WideVec& value, const Doubles& following, const Lanes& there) const {
    const WideVec reward = widened(rewards);
    const auto half = [&](int i, const Doubles& behind) {
      const Doubles next = lowered<1>(value.half[i], behind);
      return select(there, i, gae_delta(reward.half[i], value.half[i], next, gamma_), Doubles(0.0));
    };
    return {{half(0, value.half[1]), half(1, following)}};
  }

  // One step of the scan. Before, lane i holds Σ (γλ)^j·δ_(i+j) over j < kCount, as far as its half goes; after, over
  // j < 2·kCount.
  template <int kCount>
  WideVec reaching(const WideVec& sums) const {
    const auto half = [&](const Doubles& sum) {
      return gae_advantage(sum, steps_[kCount / 2], lowered<kCount>(sum, Doubles(0.0)));
    };
    return {{half(sums.half[0]), half(sums.half[1])}};
  }

  static void store(const Pointers& to, int64_t at, int64_t lanes, const Vec& advantages, const Vec& returns) {
    if (to.past_caches && lanes == kLanes) {
      store_past_caches(to.advantages + at, advantages);
      store_past_caches(to.returns + at, returns);
    } else {
      store_lanes(to.advantages + at, advantages, lanes);
      store_lanes(to.returns + at, returns, lanes);
    }
  }

  static bool is_aligned(const float* at) { return reinterpret_cast<uintptr_t>(at) % sizeof(Vec) == 0; }

  static constexpr int kVectors = 4;
  Doubles gamma_, steps_[3];
  double powers_[2 * kLanes];  // (γλ)^kLanes, …, (γλ)^1, (γλ)^0, and then 1 again to the end
};

}  // namespace

// Block by block, the last first. With shaping, a block's rewards are made just before they are used.
void gae(const GaeArguments& in, const KlShaping* shaping, bool past_caches, int64_t begin, int64_t end) {
  Scratch scratch[2];
  const Recursion recursion(in.gamma, in.lambda);
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    const Span span = span_of(in.sequences, sequence);
    const int64_t scored = shaping ? last_wanted(in.wanted + span.flat, span.length) : -1;
    Carry carry{0, in.bootstrap ? in.bootstrap[sequence] : 0.0f};
    Moments moments;
    for (int64_t stop = span.length, start; stop > 0; stop = start) {
      start = (stop - 1) / kRowBlock * kRowBlock;
      const int64_t count = stop - start, flat = span.flat + start;
      const float* rewards;
      if (shaping) {
        const int64_t last = scored >= start && scored < stop ? scored - start : -1;
        shape_block(*shaping, span, in.wanted, start, count, last, sequence, scratch);
        rewards = shaping->rewards + flat;
      } else {
        rewards = read(in.rewards, span.row, span.column + start, count, scratch[0]);
      }
      const float* values = read(in.values, span.row, span.column + start, count, scratch[1]);
      const uint8_t* wanted = in.wanted + flat;
      recursion(rewards, values, wanted, count, carry, past_caches, in.advantages + flat, in.returns + flat);
      if (in.moments) merge(moments, moments_of(in.advantages + flat, wanted, count));
    }
    if (in.moments) in.moments[sequence] = moments;
  }
  stored_past_caches();
}

void whiten(float* advantages, const uint8_t* wanted, double mean, double scale, int64_t begin, int64_t end) {
  // The mean is taken off in two parts: where advantages lie far from 0 and close together, rounding it would cost digits.
  const float high = static_cast<float>(mean), low = static_cast<float>(mean - high);
  for_lanes(end - begin, [&](int64_t i, int64_t lanes) {
    float* at = advantages + begin + i;
    const Vec centred = (load_lanes(at, lanes) - Vec(high)) - Vec(low);
    store_lanes(at, kept(lanes_of(wanted + begin + i, lanes), centred * Vec(static_cast<float>(scale))), lanes);
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
