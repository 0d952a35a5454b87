// The formulas of csrc/include, which CPU vectors and CUDA threads share, as plain floats against double precision.

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "rlhf_kernels/gae.h"
#include "rlhf_kernels/kl_reward.h"
#include "rlhf_kernels/online_softmax.h"
#include "rlhf_kernels/ppo_loss.h"
#include "rlhf_kernels/ranking_loss.h"

using namespace rlhf_kernels;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
std::mt19937_64 generator(0);
int failures = 0;

double normal() { return std::normal_distribution<double>()(generator); }
int integer(int below) { return std::uniform_int_distribution<int>(0, below - 1)(generator); }

void expect(bool holds, const char* what, double got, double want) {
  if (holds) return;
  ++failures;
  std::printf("%s: is %.17g, must be %.17g\n", what, got, want);
}

void expect_close(double got, double want, double relative, const char* what, double absolute = 0) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  expect(same || std::fabs(got - want) <= relative * std::fabs(want) + absolute, what, got, want);
}

double ulp(double x) {
  const float size = std::fabs(static_cast<float>(x));
  return std::nextafter(size, INFINITY) - size;
}

void exponentials() {
  for (double x = -104; x < 88.7; x += 0.0137) {
    const float argument = static_cast<float>(x);
    const double truth = std::exp(static_cast<double>(argument));
    const auto power = exponential(argument);
    expect_close(power.value, truth, 0, "e^x", 0.63 * ulp(truth) + 1e-45);  // a subnormal is rounded twice
    if (truth > 1e-30) expect_close(double{power.value} + power.lost, truth, 1.5e-8, "e^x with what its rounding lost");
    const double less_line = std::expm1(static_cast<double>(argument)) - argument;
    expect_close(power.less_line, less_line, 4e-7, "e^x - 1 - x", 1.2e-7);
  }
  expect_close(exponential(-INFINITY).value, 0, 0, "e^-inf", 1e-45);
  expect(std::isnan(exponential(static_cast<float>(NAN)).value), "e^NaN", exponential(static_cast<float>(NAN)).value, NAN);
}

struct Position {
  double reward, value;
  bool counts;
};

GaeMap map_of(const std::vector<Position>& positions, int first, int last, double gamma, double gamma_lambda) {
  GaeMap map;
  for (int t = last - 1; t >= first; --t) {
    if (positions[t].counts) map.take(positions[t].reward, positions[t].value, gamma, gamma_lambda);
  }
  return map;
}

void gae_scan() {
  for (int trial = 0; trial < 500; ++trial) {
    const int length = 1 + integer(40);
    const double gamma = integer(3) / 2.0, gamma_lambda = gamma * 0.95, holes = integer(11) / 10.0;
    std::vector<Position> positions(length);
    for (auto& at : positions) at = {normal(), normal(), std::uniform_real_distribution<double>()(generator) >= holes};
    const GaeState end{0, gamma * normal(), false};
    // Equation 16, position by position.
    GaeState loop = end;
    for (int t = length - 1; t >= 0; --t) {
      const auto& at = positions[t];
      if (!at.counts) continue;
      loop = {at.reward + loop.next - at.value + gamma_lambda * loop.advantage, gamma * at.value, true};
    }
    const int a = integer(length + 1), b = a + integer(length + 1 - a);
    const auto part = [&](int first, int last) { return map_of(positions, first, last, gamma, gamma_lambda); };
    const GaeMap left = joined(joined(part(0, a), part(a, b)), part(b, length));
    const GaeMap right = joined(part(0, a), joined(part(a, b), part(b, length)));
    for (const GaeState& found : {left.applied(end), right.applied(end), part(0, length).applied(end),
                                  part(0, a).applied(part(a, b).applied(part(b, length).applied(end)))}) {
      expect_close(found.advantage, loop.advantage, 1e-12, "advantage", 1e-12);
      expect_close(found.next, loop.next, 0, "next value");
      expect(found.seen == loop.seen, "whether a position counts", found.seen, loop.seen);
    }
  }
  const GaeState infinite{kInfinity, -kInfinity, true};
  const GaeState kept = joined(GaeMap(), GaeMap()).applied(infinite);
  expect(kept.advantage == kInfinity && kept.next == -kInfinity, "through what does not count", kept.advantage, kInfinity);
}

void moments() {
  for (int trial = 0; trial < 200; ++trial) {
    const double far = 1e4 * normal();
    Moments all;
    double sum = 0;
    std::vector<double> values;
    for (int parts = integer(5); parts >= 0; --parts) {
      Moments part;
      for (int count = integer(6); count > 0; --count) {
        values.push_back(far + normal());
        sum += values.back();
        merge(part, Moments{1, values.back(), 0});
      }
      merge(all, part);
    }
    double squares = 0;
    for (const double x : values) squares += (x - sum / values.size()) * (x - sum / values.size());
    expect_close(all.count, values.size(), 0, "count");
    if (values.empty()) continue;
    expect_close(all.mean, sum / values.size(), 1e-13, "mean");
    expect_close(all.squares, squares, 1e-6, "squared distances", 1e-9);
  }
}

OnlineSoftmax sums_of(const std::vector<double>& logits, size_t first, size_t last, double temperature) {
  OnlineSoftmax all;
  for (size_t i = first; i < last; ++i) merge(all, OnlineSoftmax{static_cast<float>(logits[i]), 1, 0}, 1 / temperature);
  return all;
}

void softmax() {
  for (int trial = 0; trial < 300; ++trial) {
    const size_t size = 1 + integer(30);
    const double temperature = 0.25 + integer(8), spread = trial % 3 == 0 ? 1e4 : 3;
    std::vector<double> logits(size);
    for (auto& x : logits) x = integer(6) == 0 ? -kInfinity : static_cast<float>(spread * normal());
    logits[0] = static_cast<float>(normal());
    double top = -kInfinity, sum = 0, h = 0;
    for (const double x : logits) top = std::fmax(top, x);
    for (const double x : logits) sum += std::exp((x - top) / temperature);
    for (const double x : logits) {
      const double log_p = (x - top) / temperature - std::log(sum);
      if (std::exp(log_p) > 0) h -= std::exp(log_p) * log_p;
    }
    const size_t cut = integer(static_cast<int>(size) + 1);
    OnlineSoftmax row = sums_of(logits, 0, cut, temperature);
    merge(row, sums_of(logits, cut, size, temperature), 1 / temperature);
    expect_close(row.maximum, top, 0, "maximum");
    expect_close(row.sum, sum, 1e-12, "sum of exponentials");
    expect_close(entropy(row), h, 1e-10, "entropy", 1e-10);
    const double log_p = (logits[0] - top) / temperature - std::log(sum);
    expect_close(log_prob(row, static_cast<float>(logits[0]), 1 / temperature), log_p, 1e-12, "log-prob", 1e-12);
    // d(go·log p_0 + gh·H) / d logit
    const float go = static_cast<float>(normal()), gh = static_cast<float>(normal());
    const LogitGradient<float> gradient(row.maximum, static_cast<float>(std::log(row.sum)), static_cast<float>(h), go, gh,
                                        1 / temperature);
    for (const double x : logits) {
      const double l = (x - top) / temperature - std::log(sum), p = std::exp(l);
      const double others = p == 0 ? 0 : -p * (go + gh * (l + h)) / temperature;
      expect_close(gradient.of<true>(static_cast<float>(x)), others, 1e-4, "gradient of a logit", 2e-7);
      if (x != logits[0]) continue;
      expect_close(chosen_logit_gradient(x, top, std::log(sum), h, go, gh, 1 / temperature), others + go / temperature, 1e-10,
                   "gradient of the chosen logit", 1e-10);
    }
  }
}

void kl_estimators() {
  for (double distance = -30; distance < 30; distance += 0.0171) {
    const float logprob = static_cast<float>(-1 - std::fabs(normal())), ref = static_cast<float>(logprob + distance);
    const double d = double{logprob} - double{ref};
    expect_close(kl_penalty(logprob, ref, KlEstimator::k1), d, 1e-7, "k1");
    expect_close(kl_penalty(logprob, ref, KlEstimator::k2), d * d / 2, 3e-7, "k2");
    expect_close(kl_penalty(logprob, ref, KlEstimator::abs), std::fabs(d), 1e-7, "|d|");
    expect_close(kl_penalty(logprob, ref, KlEstimator::k3), std::expm1(-d) + d, 2e-7, "k3", 1e-14);
    expect_close(kl_penalty_gradient(logprob, ref, KlEstimator::k3), -std::expm1(-d), 3e-7 + 6e-8 * std::fabs(d), "k3's gradient",
                 1e-14);
    expect_close(kl_penalty_gradient(logprob, ref, KlEstimator::k2), d, 1e-7, "k2's gradient");
  }
}

void ranking() {
  for (int trial = 0; trial < 300; ++trial) {
    const int pairs = 1 + integer(120);
    const double spread = trial % 2 ? 1 : 60;
    const float margin = trial % 3 ? 0.3f : 0;
    double truth = 0, differences = 0, short_pairs = 0;
    float product = 0;
    for (int i = 0; i < pairs; ++i) {
      const float difference = static_cast<float>(spread * normal()), x = difference - margin;
      const float tail = pair_tail(x);
      truth += std::fmax(-double{x}, 0) + std::log1p(std::exp(-std::fabs(double{x})));
      differences += x < 0 ? difference : 0;
      short_pairs += x < 0;
      product = with_tail(product, tail);
      expect_close(pair_slope(x, tail), 1 / (1 + std::exp(double{x})), 4e-7, "sigma(-x)", 1e-37);
    }
    const double loss = std::log1p(double{product}) - sum_below_zero<double>(differences, short_pairs, margin);
    expect_close(loss, truth, 1e-6, "sum of -log sigma(x)");
  }
}

void ppo_terms() {
  const auto options = PolicyOptions::of(0.2, 0.2, 3.0, {}, false, false, 0);
  for (int trial = 0; trial < 5000; ++trial) {
    const float logprob = static_cast<float>(normal()), old = static_cast<float>(logprob + 0.3 * normal());
    const float advantage = static_cast<float>(normal()), weight = 0.01f;
    const double d = double{logprob - old}, ratio = std::exp(d), kept = std::fmin(std::fmax(ratio, 0.8), 1.2);
    double loss = std::fmax(-advantage * ratio, -advantage * kept), slope = -advantage * kept > -advantage * ratio ? 0 : -advantage * ratio;
    if (advantage < 0 && loss > -3.0 * advantage) loss = -3.0 * advantage, slope = 0;
    const float log_ratio = logprob - old;
    const auto power = policy_ratio(log_ratio, options);
    const auto term = policy_term(logprob, log_ratio, power.value, power.lost, advantage, options, weight, 0.0f);
    expect_close(double{term.loss} + term.loss_lost, loss, 2e-8, "policy loss");
    expect_close(term.gradient, weight * slope, 2e-7, "policy gradient");
    expect_close(power.kl, ratio - 1 - d, 4e-7, "KL of the ratio", 1.2e-7);
  }
}

}  // namespace

int main() {
  exponentials();
  gae_scan();
  moments();
  softmax();
  kl_estimators();
  ranking();
  ppo_terms();
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
