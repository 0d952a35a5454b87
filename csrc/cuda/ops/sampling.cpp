// Tokens drawn from logits, for CUDA tensors.

#include <atomic>
#include <random>
#include <tuple>

#include "cuda/kernels.h"
#include "cuda/ops/launch.h"
#include "cuda/ops/mask.h"
#include "tensors.h"

namespace rlhf_kernels::cuda::ops {
namespace {

using namespace tensors;

// Not 0, and another one every time. It begins anywhere: memory on a GPU may hold what another process left there.
uint64_t next_launch() {
  static std::atomic<uint64_t> number = [] {
    std::random_device device;
    return uint64_t{device()} << 32 | device();
  }();
  uint64_t result;
  do result = number++;
  while (result == 0);
  return result;
}

std::tuple<Tensor, Tensor> sample_tokens(Tensor logits, Tensor stream, Tensor step, int64_t seed, double temperature) {
  const Launch launch(logits);
  logits = with_dense_rows(logits);
  const cuda::SamplingInputs in{logits_of(logits), integers_of(stream), integers_of(step), static_cast<uint64_t>(seed),
                                temperature};
  std::vector<int64_t> shape = sizes(logits);
  shape.pop_back();
  Tensor tokens = launch.empty(shape, ScalarType::Long), logprobs = launch.empty(shape);
  const SamplingResults out{mutable_data<int64_t>(tokens), mutable_data<float>(logprobs)};
  const int64_t rows = tokens.numel();
  const Tensor workspace = launch.bytes(cuda::sampling_workspace(rows, in.vocabulary));
  cuda::sample_tokens(in, out, rows, workspace.mutable_data_ptr(), next_launch(), launch.stream);
  return {tokens, logprobs};
}

}  // namespace

RLHF_CUDA_OPS(library) { library.impl("sample_tokens", TORCH_BOX(&sample_tokens)); }

}  // namespace rlhf_kernels::cuda::ops
