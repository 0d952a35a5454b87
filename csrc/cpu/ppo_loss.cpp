// PPO's losses: loss, statistics and gradient from one read of the three inputs.

#include <cmath>

#include "cpu/rows.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

namespace {

// In double: more exact, and an infinite term leaves the sum infinite, where compensation leaves NaN.
struct LossSum {
  WideVec total;
  Vec lost{0.0f};

  void add(const Vec& x) { total += widened(x); }
  void add(const Vec& x, const Vec& lost_by_x) {
    add(x);
    lost = lost + lost_by_x;
  }

  double value() const {
    const double rough = sum(total);
    return std::isfinite(rough) ? rough + sum(lost) : rough;
  }
};

template <class T, bool kGradient>
void policy_rows(const PolicyArguments& in, int64_t begin, int64_t end) {
  Scratch scratch[3], log_ratios, ratios, lost;
  for (int64_t row = begin; row < end; ++row) {
    LossSum loss;
    WideVec ratio_total, kl_total, clipped_total;
    Vec deviation(0.0f);
    const Vec weight(static_cast<float>(in.weights[row])), weight_lost = lost_by_conversion<Vec>(in.weights[row]);
    const int64_t left = in.positions - row * in.length, length = left < in.length ? left : in.length;
    for (int64_t t = 0; t < length; t += kRowBlock) {
      const int64_t count = length - t < kRowBlock ? length - t : kRowBlock, flat = row * in.length + t;
      const T* logprobs = read_as<T>(in.logprobs, row, t, count, scratch[0]);
      const T* old = read_as<T>(in.old_logprobs, row, t, count, scratch[1]);
      const T* advantages = read_as<T>(in.advantages, row, t, count, scratch[2]);
      Vec ratio(0.0f), kl(0.0f), clipped(0.0f);
      // The ratios have a loop of their own: exponentials take long, and in one loop with the rest more instructions would
      // wait for them than a processor can hold.
      for_lanes(count, [&](int64_t i, int64_t lanes) {
        const Lanes keep = lanes_of(in.wanted + flat + i, lanes);
        const Vec log_ratio = kept(keep, load_lanes(logprobs + i, lanes) - load_lanes(old + i, lanes));
        const auto here = policy_ratio(log_ratio);
        here.value.store(ratios.values + i);
        here.lost.store(lost.values + i);
        if constexpr (kGradient) log_ratio.store(log_ratios.values + i);
        // A masked position has ratio 1: only that must be kept out of the sums.
        ratio = add_where(keep, ratio, here.value);
        deviation = larger(here.deviation, deviation);
        kl = kl + here.kl;
      });
      for_lanes(count, [&](int64_t i, int64_t lanes) {
        const Lanes keep = lanes_of(in.wanted + flat + i, lanes);
        const auto at = [&](const Scratch& from) { return load_lanes(from.values + i); };
        const Vec log_ratio = kGradient ? at(log_ratios) : Vec(0.0f);  // only the gradient needs it
        const Vec advantage = kept(keep, load_lanes(advantages + i, lanes));
        const auto term = policy_term(log_ratio, at(ratios), at(lost), advantage, in.clip, weight, weight_lost);
        loss.add(term.loss, term.loss_lost);
        clipped = clipped + term.clipped;
        if constexpr (kGradient) store_lanes(in.gradient + flat + i, term.gradient, lanes);
      });
      ratio_total += widened(ratio);
      kl_total += widened(kl);
      clipped_total += widened(clipped);
    }
    PolicySums& sums = in.sums[row];
    sums.loss = loss.value() * in.weights[row];
    const double ratios_of_row = sum(ratio_total);
    sums.statistics.ratio = ratios_of_row;
    // Where a ratio was NaN, so is their sum; the largest deviation has passed over it.
    sums.statistics.deviation = std::isnan(ratios_of_row) ? NAN : static_cast<double>(largest(deviation));
    sums.statistics.kl = sum(kl_total);
    sums.statistics.clipped = sum(clipped_total);
  }
}

template <class T>
void value_rows(const ValueArguments& in, int64_t begin, int64_t end) {
  Scratch scratch[3];
  for (int64_t row = begin; row < end; ++row) {
    LossSum loss;
    WideVec value_total, target_total, clipped_total;
    const Vec weight(static_cast<float>(in.weights[row]));
    const int64_t left = in.positions - row * in.length, length = left < in.length ? left : in.length;
    for (int64_t t = 0; t < length; t += kRowBlock) {
      const int64_t count = length - t < kRowBlock ? length - t : kRowBlock, flat = row * in.length + t;
      const T* values = read_as<T>(in.values, row, t, count, scratch[0]);
      const T* old = read_as<T>(in.old_values, row, t, count, scratch[1]);
      const T* returns = read_as<T>(in.returns, row, t, count, scratch[2]);
      Vec value(0.0f), target(0.0f), clipped(0.0f);
      for_lanes(count, [&](int64_t i, int64_t lanes) {
        const Lanes keep = lanes_of(in.wanted + flat + i, lanes);
        const auto read_kept = [&](const T* from) { return kept(keep, load_lanes(from + i, lanes)); };
        const Vec v = read_kept(values), r = read_kept(returns);
        const auto term = value_term(v, read_kept(old), r, in.clip_range);
        loss.add(term.loss);
        value = value + v;
        target = target + r;
        clipped = clipped + term.clipped;
        if (in.gradient) store_lanes(in.gradient + flat + i, term.gradient * weight, lanes);
      });
      value_total += widened(value);
      target_total += widened(target);
      clipped_total += widened(clipped);
    }
    in.sums[row] = {loss.value() * in.weights[row], {sum(value_total), sum(target_total), sum(clipped_total)}};
  }
}

}  // namespace

void ppo_policy(const PolicyArguments& in, int64_t begin, int64_t end) {
  for_common_dtype(
      [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        in.gradient ? policy_rows<T, true>(in, begin, end) : policy_rows<T, false>(in, begin, end);
      },
      in.logprobs, in.old_logprobs, in.advantages);
}

void ppo_value(const ValueArguments& in, int64_t begin, int64_t end) {
  for_common_dtype([&](auto* type) { value_rows<std::remove_pointer_t<decltype(type)>>(in, begin, end); }, in.values,
                   in.old_values, in.returns);
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
