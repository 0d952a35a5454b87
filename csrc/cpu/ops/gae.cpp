// Advantages and returns, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/ops/mask.h"
#include "cpu/ops/memory.h"
#include "tensors.h"

namespace rlhf_kernels::cpu::ops {
namespace {

using namespace tensors;

using Whitening = std::optional<std::string>;  // none, "population" or "unbiased"

// GAE, with rewards shaped on the way if there is a shaping; then whitening over everything unmasked.
std::tuple<Tensor, Tensor> advantages_of(const Tensor& like, const Mask& mask, GaeArguments in,
                                         const KlShaping* shaping, const Whitening& whiten) {
  Tensor advantages = empty(sizes(like), ScalarType::Float), returns = empty(sizes(like), ScalarType::Float);
  in.wanted = mask.data();
  in.advantages = mutable_data<float>(advantages);
  in.returns = mutable_data<float>(returns);
  std::vector<Moments> moments(whiten ? in.sequences.count : 0);
  in.moments = whiten ? moments.data() : nullptr;
  // By position: packed sequences are not of one length.
  const auto sequence_from = [&](int64_t position) {
    if (!in.sequences.boundaries) return divide_up(position, in.sequences.length);
    const int64_t* first = in.sequences.boundaries;
    return static_cast<int64_t>(std::lower_bound(first, first + in.sequences.count, position) - first);
  };
  // Whitening reads the advantages again at once.
  constexpr int64_t cached_bytes = int64_t{4} << 20;
  const bool past_caches = !whiten && like.numel() * static_cast<int64_t>(2 * sizeof(float)) > cached_bytes;
  parallel(like.numel(), 4, [&](int64_t begin, int64_t end) {
    const int64_t first = sequence_from(begin), last = sequence_from(end);
    mask.read(in.sequences, first, last);
    kernels().gae(in, shaping, past_caches, first, last);
  });
  mask.check();
  if (whiten) {
    Moments all;
    for (const auto& sequence : moments) merge(all, sequence);
    const double scale = whitening_scale(all, whiten == "unbiased");
    parallel(like.numel(), 1, [&](int64_t begin, int64_t end) {
      kernels().whiten(in.advantages, in.wanted, all.mean, scale, begin, end);
    });
  }
  return {advantages, returns};
}

std::tuple<Tensor, Tensor> masked_gae(Tensor rewards, Tensor values, OptionalTensor mask, double gamma, double lam,
                                      OptionalTensor bootstrap, Whitening whiten, OptionalTensor cu_seqlens) {
  const Mask wanted("mask", mask, rewards);
  const OptionalTensor last = as_float(bootstrap), boundaries = as_int64(cu_seqlens);
  return advantages_of(rewards, wanted,
                       {view_of(rewards), view_of(values), nullptr,
                        checks::checked_sequences("cu_seqlens", rewards, boundaries), gamma, lam, data<float>(last),
                        nullptr, nullptr, nullptr, false},
                       nullptr, whiten);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs,
                                                          Tensor values, OptionalTensor mask, double beta, double gamma,
                                                          double lam, Whitening whiten, OptionalTensor bootstrap,
                                                          std::string estimator, std::optional<double> score_clip,
                                                          OptionalTensor cu_seqlens) {
  const Mask wanted("mask", mask, logprobs);
  const Tensor row_scores = cast(scores, ScalarType::Float);
  const OptionalTensor last = as_float(bootstrap), boundaries = as_int64(cu_seqlens);
  Tensor rewards = empty(sizes(logprobs), ScalarType::Float), kl = empty(sizes(logprobs), ScalarType::Float);
  const auto shaping = shaping_of(row_scores, logprobs, ref_logprobs, beta, estimator, score_clip, rewards, kl);
  const auto [advantages, returns] = advantages_of(
      logprobs, wanted,
      {{}, view_of(values), nullptr, checks::checked_sequences("cu_seqlens", logprobs, boundaries), gamma, lam,
       data<float>(last), nullptr, nullptr, nullptr, false},
      &shaping, whiten);
  return {advantages, returns, rewards, kl};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, library) {
  library.impl("masked_gae", TORCH_BOX(&masked_gae));
  library.impl("ppo_advantages", TORCH_BOX(&ppo_advantages));
}

}  // namespace rlhf_kernels::cpu::ops
