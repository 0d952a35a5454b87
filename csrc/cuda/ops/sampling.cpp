// Tokens drawn from logits, for CUDA tensors.

#include <tuple>

#include "cuda/kernels.h"
#include "cuda/ops/launch.h"
#include "tensors.h"

namespace rlhf_kernels::cuda::ops {
namespace {

using namespace tensors;

std::tuple<Tensor, Tensor> sample_tokens(Tensor logits, Tensor stream, Tensor step, int64_t seed, double temperature) {
  const Launch launch(logits);
  logits = with_dense_rows(logits);
  const Tensor streams = cast(stream, ScalarType::Long), steps = cast(step, ScalarType::Long);
  const auto in = sampling_arguments(logits, streams, steps, seed, temperature);
  Tensor tokens = launch.empty(sizes(stream), ScalarType::Long), logprobs = launch.empty_like(stream);
  const SamplingResults out{mutable_data<int64_t>(tokens), mutable_data<float>(logprobs)};
  const int64_t rows = stream.numel(), chunks = cuda::vocabulary_chunks(in.vocabulary);
  const Tensor sums = launch.bytes(rows * chunks * static_cast<int64_t>(sizeof(OnlineSoftmax)));
  const Tensor tickets = chunks > 1 && rows > 0 ? launch.zeros({rows}, ScalarType::Int) : launch.nothing();
  cuda::sample_tokens(in, out, rows, mutable_data<OnlineSoftmax>(sums), mutable_data<unsigned>(tickets), launch.stream);
  return {tokens, logprobs};
}

}  // namespace

RLHF_CUDA_OPS(library) { library.impl("sample_tokens", TORCH_BOX(&sample_tokens)); }

}  // namespace rlhf_kernels::cuda::ops
