// Advantages from the last position of a sequence to its first, and their whitening.

#include <algorithm>

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

// What comes to a position from its right: the advantage and the value of the next one that counts.
struct Carry {
  double advantage;
  float value;
};

// A vector's worth of a sequence at a time. What counts of it is moved together, so that the recursion steps over the rest
// as if it were not there. The recursion waits for its own last result: so the sums over these positions alone are made
// first, in steps that double their reach (Hillis and Steele 1986), and what comes from the right is added in a loop of its
// own, which waits for little. In double: long sequences lose no digits.
class Recursion {
 public:
  Recursion(double gamma, double lambda) : gamma_(gamma) {
    double power = 1;
    std::fill(powers_ + kLanes, powers_ + 2 * kLanes, power);
    for (int64_t i = kLanes; i-- > 0; powers_[i] = power) power *= gamma * lambda;
    for (int i = 0; i < 3; ++i) steps_[i] = Doubles(powers_[kLanes - (1 << i)]);
  }

  // Of a block. What does not count becomes 0. Past the caches: where the results lie so that whole vectors can be stored so.
  void operator()(const float* rewards, const float* values, const uint8_t* wanted, int64_t length, Carry& carry,
                  bool past_caches, float* advantages, float* returns) {
    past_caches = past_caches && is_aligned(advantages) && is_aligned(returns);
    const auto store = [&](float* to, const Vec& result, int64_t lanes) {
      if (past_caches && lanes == kLanes) return store_past_caches(to, result);
      store_lanes(to, result, lanes);
    };
    const int64_t vectors = (length + kLanes - 1) / kLanes;
    const auto lanes_from = [&](int64_t at) { return std::min(kLanes, length - at); };
    Vec next_value(carry.value);
    Doubles next(static_cast<double>(carry.value));
    for (int64_t n = vectors; n-- > 0;) {
      const int64_t at = n * kLanes, lanes = lanes_from(at);
      keep_[n] = lanes_of(wanted + at, lanes);
      found_[n] = count(keep_[n]);
      if (found_[n] == 0) continue;
      next_value = values_[n] = compressed(keep_[n], load_lanes(values + at, lanes), next_value);
      const WideVec reward = widened(compressed(keep_[n], load_lanes(rewards + at, lanes), Vec(0.0f)));
      const WideVec value = widened(values_[n]);
      const Lanes there = first_lanes(found_[n]);
      const Doubles right = sums(select(there, 1, delta(reward, value, 1, next), Doubles(0.0)));
      const Doubles left = sums(select(there, 0, delta(reward, value, 0, value.half[1]), Doubles(0.0)));
      sums_[n] = {{at::vec::fmadd(Doubles::loadu(powers_ + kHalf), first_everywhere(right), left), right}};
      next = first_everywhere(value.half[0]);
      next_value = first_everywhere(next_value);
    }
    Doubles after(carry.advantage);
    for (int64_t n = vectors; n-- > 0;) {
      const int64_t at = n * kLanes, lanes = lanes_from(at);
      if (found_[n] == 0) {
        store(advantages + at, Vec(0.0f), lanes);
        store(returns + at, Vec(0.0f), lanes);
        continue;
      }
      const double* powers = powers_ + kLanes - found_[n];  // from the one that is the whole way to the right, down
      const WideVec value = widened(values_[n]);
      const WideVec advantage{{at::vec::fmadd(Doubles::loadu(powers), after, sums_[n].half[0]),
                               at::vec::fmadd(Doubles::loadu(powers + kHalf), after, sums_[n].half[1])}};
      after = at::vec::fmadd(Doubles(*powers), after, first_everywhere(sums_[n].half[0]));
      const WideVec target{{advantage.half[0] + value.half[0], advantage.half[1] + value.half[1]}};
      store(advantages + at, expanded(keep_[n], rounded(advantage)), lanes);
      store(returns + at, expanded(keep_[n], rounded(target)), lanes);
    }
    double all[kHalf];
    float all_values[kLanes];
    after.store(all);
    next_value.store(all_values);
    carry = {all[0], all_values[0]};
  }

 private:
  Doubles delta(const WideVec& reward, const WideVec& value, int half, const Doubles& following) const {
    return gae_delta(reward.half[half], value.half[half], lowered<1>(value.half[half], following), gamma_);
  }

  // Σ (γλ)^k·δ of a lane and those after it.
  Doubles sums(Doubles sum) const {
    const Doubles zero(0.0);
    sum = at::vec::fmadd(steps_[0], lowered<1>(sum, zero), sum);
    sum = at::vec::fmadd(steps_[1], lowered<2>(sum, zero), sum);
    if constexpr (kHalf > 4) sum = at::vec::fmadd(steps_[2], lowered<4>(sum, zero), sum);
    return sum;
  }

  static bool is_aligned(const float* at) { return reinterpret_cast<uintptr_t>(at) % sizeof(Vec) == 0; }

  static constexpr int64_t kVectors = kRowBlock / kLanes;
  Doubles gamma_, steps_[3];
  double powers_[2 * kLanes];  // of γλ, from that of kLanes down to that of 0, which goes on
  WideVec sums_[kVectors];
  Vec values_[kVectors];
  Lanes keep_[kVectors];
  int64_t found_[kVectors];
};

}  // namespace

// Block by block, the last first. With shaping, a block's rewards are made just before they are used.
void gae(const GaeArguments& in, const KlShaping* shaping, bool past_caches, int64_t begin, int64_t end) {
  Scratch scratch[2];
  Recursion recursion(in.gamma, in.lambda);
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
