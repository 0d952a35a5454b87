// The pairwise ranking loss, for CPU tensors.

#include <torch/csrc/stable/library.h>

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

std::tuple<Tensor, Tensor, Tensor> pairwise_ranking_loss(Tensor scores, Tensor ranks, OptionalTensor offsets,
                                                         OptionalTensor mask, double margin, bool with_gradient) {
  const auto& k = kernels();
  const Tensor values = dense(scores), dense_ranks = cast(ranks, ScalarType::Long);
  std::optional<Mask> wanted;
  if (mask) wanted.emplace("mask", mask, scores);
  const OptionalTensor boundaries = as_int64(offsets);
  const auto prompts = checks::checked_sequences("offsets", scores, boundaries);
  Tensor gradient = with_gradient ? empty(sizes(scores), ScalarType::Float) : nothing();
  const int64_t per_group = k.lanes(), groups = divide_up(prompts.count, per_group);
  std::vector<double> losses(groups), accuracies(groups);
  std::vector<int64_t> counts(groups);
  const RankingArguments in{values.const_data_ptr(), dtype_of(values), data<int64_t>(dense_ranks),
                            wanted ? wanted->data() : nullptr, prompts, static_cast<float>(margin),
                            with_gradient ? mutable_data<float>(gradient) : nullptr,
                            losses.data(), accuracies.data(), counts.data()};
  const int64_t width = prompts.count ? scores.numel() / prompts.count : 0;
  parallel(groups, per_group * width * width * 4,
           [&](int64_t begin, int64_t end) {
             const int64_t last = std::min(end * per_group, prompts.count);
             if (wanted) wanted->read(prompts, begin * per_group, last);
             k.ranking(in, begin, end);
           });
  if (wanted) wanted->check();
  double loss = 0, accuracy = 0;
  int64_t some = 0;
  for (int64_t group = 0; group < groups; ++group) {
    loss += losses[group];
    accuracy += accuracies[group];
    some += counts[group];
  }
  const double share = some ? 1.0 / static_cast<double>(some) : 0.0;
  if (with_gradient && some && some < prompts.count) {
    float* slopes = mutable_data<float>(gradient);
    const double rest = static_cast<double>(prompts.count) * share;
    parallel(scores.numel(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) slopes[i] = static_cast<float>(slopes[i] * rest);
    });
  }
  return {scalar(loss * share), scalar(accuracy * share), gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, library) {
  library.impl("pairwise_ranking_loss", TORCH_BOX(&pairwise_ranking_loss));
}

}  // namespace rlhf_kernels::cpu::ops
