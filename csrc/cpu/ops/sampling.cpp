// Tokens drawn from logits, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/ops/memory.h"
#include "tensors.h"

namespace rlhf_kernels::cpu::ops {
namespace {

using namespace tensors;

// with_dense_rows, but faster for logits in columns.
Tensor by_row(const Tensor& logits) {
  const bool in_columns = logits.dim() == 2 && logits.stride(0) == 1 && logits.scalar_type() == ScalarType::Float;
  if (!in_columns || has_dense_rows(logits)) return with_dense_rows(logits);
  Tensor result = empty(sizes(logits), ScalarType::Float);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1), lanes = kernels().lanes();
  parallel(divide_up(rows, lanes) * divide_up(vocabulary, lanes), lanes * lanes, [&](int64_t begin, int64_t end) {
    kernels().logits_by_row(data<float>(logits), logits.stride(1), rows, vocabulary, mutable_data<float>(result), begin,
                            end);
  });
  return result;
}

std::tuple<Tensor, Tensor> sample_tokens(Tensor logits, Tensor stream, Tensor step, int64_t seed, double temperature) {
  logits = by_row(logits);
  const Tensor streams = cast(stream, ScalarType::Long), steps = cast(step, ScalarType::Long);
  const auto numbers = [](const Tensor& tensor) {
    const auto all = number_of(tensor);
    return Numbers{all ? nullptr : data<int64_t>(tensor), all.value_or(0)};
  };
  const SamplingArguments in{logits_of(logits), numbers(streams), numbers(steps), static_cast<uint64_t>(seed), temperature};
  std::vector<int64_t> shape = sizes(logits);
  shape.pop_back();
  Tensor tokens = empty(shape, ScalarType::Long), logprobs = empty(shape, ScalarType::Float);
  const SamplingResults out{mutable_data<int64_t>(tokens), mutable_data<float>(logprobs)};
  parallel(tokens.numel(), in.vocabulary,
           [&](int64_t begin, int64_t end) { kernels().sample_tokens(in, out, begin, end); });
  checks::check_drawn(tokens);
  return {tokens, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, library) { library.impl("sample_tokens", TORCH_BOX(&sample_tokens)); }

}  // namespace rlhf_kernels::cpu::ops
