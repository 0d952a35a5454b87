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

// The mean of a row's log-ratios, for the one ratio of a sequence (Zheng et al. 2025, arXiv 2507.18071, equation 7).
template <class T>
double mean_log_ratio(const PolicyArguments& in, int64_t row, int64_t length) {
  Scratch scratch[2];
  WideVec total;
  for (int64_t t = 0; t < length; t += kRowBlock) {
    const int64_t count = length - t < kRowBlock ? length - t : kRowBlock;
    const T* logprobs = read_as<T>(in.logprobs, row, t, count, scratch[0]);
    const T* old = read_as<T>(in.old_logprobs, row, t, count, scratch[1]);
    for_lanes(count, [&](int64_t i, int64_t lanes) {
      const Lanes keep = lanes_of(in.wanted + row * in.length + t + i, lanes);
      total += widened(kept(keep, load_lanes(logprobs + i, lanes) - load_lanes(old + i, lanes)));
    });
  }
  const int64_t number = count_wanted(in.wanted + row * in.length, length);
  return number ? sum(total) / static_cast<double>(number) : 0.0;
}

// Adds the penalty on the way from the reference policy to the loss of a block of a row, and to its gradient.
template <class T>
void add_reference(const PolicyArguments& in, const T* logprobs, const T* references, int64_t flat, int64_t count,
                   double weight, LossSum& loss, WideVec& kl_total) {
  const Vec beta(static_cast<float>(in.options.beta)), beta_lost = lost_by_conversion<Vec>(in.options.beta);
  const Vec slope(static_cast<float>(in.options.beta * weight));
  for_lanes(count, [&](int64_t i, int64_t lanes) {
    const Lanes keep = lanes_of(in.wanted + flat + i, lanes);
    const Vec x = kept(keep, load_lanes(logprobs + i, lanes)), y = kept(keep, load_lanes(references + i, lanes));
    const Vec kl = k3_penalty(x, y), term = beta * kl;
    kl_total += widened(kl);
    if (in.options.beta == 0) return;
    loss.add(term, multiply_add(beta_lost, kl, lost_by_product(beta, kl, term)));
    if (!in.gradient) return;
    const Vec gradient = load_lanes(in.gradient + flat + i, lanes);
    store_lanes(in.gradient + flat + i, multiply_add(k3_gradient(x, y), slope, gradient), lanes);
  });
}

template <class T, bool kGradient>
void policy_rows(const PolicyArguments& in, int64_t begin, int64_t end) {
  Scratch scratch[4], log_ratios, ratios, lost;
  for (int64_t row = begin; row < end; ++row) {
    LossSum loss;
    WideVec ratio_total, log_ratio_total, kl_total, clipped_total, dual_clipped_total, ref_kl_total;
    Vec deviation(0.0f);
    const Vec weight(static_cast<float>(in.weights[row])), weight_lost = lost_by_conversion<Vec>(in.weights[row]);
    const int64_t left = in.positions - row * in.length, length = left < in.length ? left : in.length;
    const Vec of_sequence(in.options.by_sequence ? static_cast<float>(mean_log_ratio<T>(in, row, length)) : 0.0f);
    for (int64_t t = 0; t < length; t += kRowBlock) {
      const int64_t count = length - t < kRowBlock ? length - t : kRowBlock, flat = row * in.length + t;
      const T* logprobs = read_as<T>(in.logprobs, row, t, count, scratch[0]);
      const T* old = read_as<T>(in.old_logprobs, row, t, count, scratch[1]);
      const T* advantages = read_as<T>(in.advantages, row, t, count, scratch[2]);
      Vec ratio(0.0f), log_ratios_sum(0.0f), kl(0.0f), clipped(0.0f), dual_clipped(0.0f);
      // The ratios have a loop of their own: exponentials take long, and in one loop with the rest more instructions would
      // wait for them than a processor can hold.
      for_lanes(count, [&](int64_t i, int64_t lanes) {
        const Lanes keep = lanes_of(in.wanted + flat + i, lanes);
        const Vec of_token = load_lanes(logprobs + i, lanes) - load_lanes(old + i, lanes);
        const Vec log_ratio = kept(keep, in.options.by_sequence ? of_sequence : of_token);
        const auto here = policy_ratio(log_ratio, in.options);
        here.value.store(ratios.values + i);
        here.lost.store(lost.values + i);
        if constexpr (kGradient) log_ratio.store(log_ratios.values + i);
        // A masked position has ratio 1: only that must be kept out of the sums.
        ratio = add_where(keep, ratio, here.value);
        log_ratios_sum = log_ratios_sum + log_ratio;
        deviation = larger(here.deviation, deviation);
        kl = kl + here.kl;
      });
      for_lanes(count, [&](int64_t i, int64_t lanes) {
        const Lanes keep = lanes_of(in.wanted + flat + i, lanes);
        const auto at = [&](const Scratch& from) { return load_lanes(from.values + i); };
        const Vec log_ratio = kGradient ? at(log_ratios) : Vec(0.0f);  // only the gradient needs it
        const Vec advantage = kept(keep, load_lanes(advantages + i, lanes));
        const Vec logprob = in.options.cispo ? kept(keep, load_lanes(logprobs + i, lanes)) : Vec(0.0f);
        const auto term =
            policy_term(logprob, log_ratio, at(ratios), at(lost), advantage, in.options, weight, weight_lost);
        loss.add(term.loss, term.loss_lost);
        clipped = clipped + term.clipped;
        dual_clipped = dual_clipped + term.dual_clipped;
        if constexpr (kGradient) store_lanes(in.gradient + flat + i, term.gradient, lanes);
      });
      if (in.ref_logprobs.data) {
        const T* references = read_as<T>(in.ref_logprobs, row, t, count, scratch[3]);
        add_reference(in, logprobs, references, flat, count, in.weights[row], loss, ref_kl_total);
      }
      ratio_total += widened(ratio);
      log_ratio_total += widened(log_ratios_sum);
      kl_total += widened(kl);
      clipped_total += widened(clipped);
      dual_clipped_total += widened(dual_clipped);
    }
    PolicySums& sums = in.sums[row];
    sums.loss = loss.value() * in.weights[row];
    const double ratios_of_row = sum(ratio_total);
    sums.statistics.ratio = ratios_of_row;
    sums.statistics.log_ratio = sum(log_ratio_total);
    // Where a ratio was NaN, so is their sum; the largest deviation has passed over it.
    sums.statistics.deviation = std::isnan(ratios_of_row) ? NAN : static_cast<double>(largest(deviation));
    sums.statistics.kl = sum(kl_total);
    sums.statistics.clipped = sum(clipped_total);
    sums.statistics.dual_clipped = sum(dual_clipped_total);
    sums.statistics.ref_kl = sum(ref_kl_total);
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
      in.logprobs, in.old_logprobs, in.advantages, in.ref_logprobs.data ? in.ref_logprobs : in.logprobs);
}

void ppo_value(const ValueArguments& in, int64_t begin, int64_t end) {
  for_common_dtype([&](auto* type) { value_rows<std::remove_pointer_t<decltype(type)>>(in, begin, end); }, in.values,
                   in.old_values, in.returns);
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
