// The KL penalty and the rewards that it shapes, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/kernels.h"
#include "cpu/ops/mask.h"
#include "cpu/ops/memory.h"
#include "cpu/ops/rows.h"
#include "tensors.h"

namespace rlhf_kernels::cpu::ops {
namespace {

using namespace tensors;

// run(rows as views, mask's bytes, length, begin, end) for rows [begin, end).
template <class Run>
void for_rows(const Tensor& logprobs, const Tensor& ref_logprobs, const OptionalTensor& mask, Run&& run) {
  const TokenRows rows(logprobs);
  const auto a = rows.view(logprobs), b = rows.view(ref_logprobs);
  // A flat tensor's last row may be short, which these kernels do not know: one row then.
  const int64_t count = logprobs.dim() == 2 ? rows.count : 1, length = logprobs.dim() == 2 ? rows.length : rows.positions;
  std::optional<Mask> wanted;
  if (mask) wanted.emplace("mask", mask, logprobs);
  parallel(count, length, [&](int64_t begin, int64_t end) {
    if (wanted) wanted->read(begin * length, end * length);
    run(a, b, wanted ? wanted->data() : nullptr, length, begin, end);
  });
  if (wanted) wanted->check();
}

Tensor kl_penalty(Tensor logprobs, Tensor ref_logprobs, OptionalTensor mask, std::string estimator) {
  Tensor result = empty(sizes(logprobs), ScalarType::Float);
  for_rows(logprobs, ref_logprobs, mask,
           [&](const View& a, const View& b, const uint8_t* kept, int64_t length, int64_t begin, int64_t end) {
             kernels().kl_penalty(a, b, kept, length, estimator_of(estimator), mutable_data<float>(result), begin, end);
           });
  return result;
}

Tensor kl_penalty_backward(Tensor logprobs, Tensor ref_logprobs, OptionalTensor mask, std::string estimator,
                           Tensor gradient) {
  const Tensor slopes = cast(gradient, ScalarType::Float);
  Tensor result = empty(sizes(logprobs), ScalarType::Float);
  for_rows(logprobs, ref_logprobs, mask,
           [&](const View& a, const View& b, const uint8_t* kept, int64_t length, int64_t begin, int64_t end) {
             kernels().kl_penalty_backward(a, b, kept, length, estimator_of(estimator), data<float>(slopes),
                                           mutable_data<float>(result), begin, end);
           });
  return result;
}

std::tuple<Tensor, Tensor> kl_shaped_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, OptionalTensor mask,
                                             double beta, std::string estimator, std::optional<double> score_clip) {
  const Mask wanted("mask", mask, logprobs);
  const Tensor row_scores = cast(scores, ScalarType::Float);
  Tensor rewards = empty(sizes(logprobs), ScalarType::Float), kl = empty(sizes(logprobs), ScalarType::Float);
  const auto shaping = shaping_of(row_scores, logprobs, ref_logprobs, beta, estimator, score_clip, rewards, kl);
  const Sequences sequences{logprobs.size(0), logprobs.size(1), nullptr};
  parallel(sequences.count, sequences.length, [&](int64_t begin, int64_t end) {
    wanted.read(sequences, begin, end);
    kernels().kl_shaped_rewards(shaping, sequences, wanted.data(), begin, end);
  });
  wanted.check();
  return {rewards, kl};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, library) {
  library.impl("kl_penalty", TORCH_BOX(&kl_penalty));
  library.impl("kl_penalty_backward", TORCH_BOX(&kl_penalty_backward));
  library.impl("kl_shaped_rewards", TORCH_BOX(&kl_shaped_rewards));
}

}  // namespace rlhf_kernels::cpu::ops
