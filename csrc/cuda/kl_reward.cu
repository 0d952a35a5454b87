// Per-token KL penalties, their derivative, and rewards shaped by them.

#include "cuda/device.h"
#include "rlhf_kernels/kl_reward.h"

namespace rlhf_kernels::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kChunk = kThreads * kVector;

// One block per chunk of a row. Writes the penalty, or where `gradient` is given, the derivative times the gradient.
__global__ void __launch_bounds__(kThreads) penalty_kernel(View logprobs, View ref_logprobs, Mask mask,
                                                           int64_t length, unsigned per_row, KlEstimator estimator,
                                                           const float* gradient, float* result) {
  const int64_t row = blockIdx.x / per_row, t = int64_t{blockIdx.x % per_row} * kChunk + threadIdx.x * kVector;
  const int64_t count = length - t, flat = row * length + t;
  if (count <= 0) return;
  const Packed packed = fetch(logprobs, row, t, count), packed_ref = fetch(ref_logprobs, row, t, count);
  const unsigned counts = load_mask(mask, flat, count);
  Packed slopes;
  if (gradient) slopes = fetch(gradient, flat, count);
  float x[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float logprob = packed.of(i, logprobs.dtype), ref = packed_ref.of(i, ref_logprobs.dtype);
    if (!(counts >> i & 1)) {
      x[i] = 0;
      continue;
    }
    x[i] = gradient ? slopes.of(i, Dtype::float32) * kl_penalty_gradient(logprob, ref, estimator)
                    : rlhf_kernels::kl_penalty(logprob, ref, estimator);
  }
  store_vector(result, Dtype::float32, flat, count, x);
}

// One block per row. It first looks for the last unmasked position, which gets the score.
__global__ void __launch_bounds__(kThreads) rewards_kernel(KlShaping in, int64_t length, Mask mask) {
  __shared__ int64_t between[kThreads / kWarp];
  __shared__ int64_t scored;
  const int64_t row = blockIdx.x, base = row * length;
  int64_t last = -1;
  for (int64_t t = int64_t{threadIdx.x} * kVector; t < length; t += kChunk) {
    const unsigned counts = load_mask(mask, base + t, length - t);
    if (counts) last = t + kWarp - 1 - __clz(static_cast<int>(counts));
  }
  last = block_merge(last, between, [](int64_t& a, int64_t b) { a = b > a ? b : a; });
  if (threadIdx.x == 0) scored = last;
  __syncthreads();
  last = scored;
  const double score = clipped_score(in.scores[row], in.score_clip);
  for (int64_t t = int64_t{threadIdx.x} * kVector; t < length; t += kChunk) {
    const int64_t count = length - t;
    const unsigned counts = load_mask(mask, base + t, count);
    const Packed packed = fetch(in.logprobs, row, t, count), packed_ref = fetch(in.ref_logprobs, row, t, count);
    float kl[kVector], rewards[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float logprob = packed.of(i, in.logprobs.dtype), ref = packed_ref.of(i, in.ref_logprobs.dtype);
      kl[i] = counts >> i & 1 ? rlhf_kernels::kl_penalty(logprob, ref, in.estimator) : 0.0f;
      rewards[i] = counts >> i & 1 ? shaped_reward(t + i == last ? score : 0, in.beta, kl[i]) : 0.0f;
    }
    store_vector(in.rewards, Dtype::float32, base + t, count, rewards);
    store_vector(in.kl, Dtype::float32, base + t, count, kl);
  }
}

void run(const View& logprobs, const View& ref_logprobs, const Mask& mask, int64_t rows, int64_t length,
         KlEstimator estimator, const float* gradient, float* result, Stream stream) {
  const int64_t per_row = divide_up(length, kChunk);
  launch(penalty_kernel, rows * per_row, kThreads, stream, logprobs, ref_logprobs, mask, length, per_row, estimator,
         gradient, result);
}

}  // namespace

void kl_penalty(const View& logprobs, const View& ref_logprobs, const Mask& mask, int64_t rows, int64_t length,
                KlEstimator estimator, float* result, Stream stream) {
  run(logprobs, ref_logprobs, mask, rows, length, estimator, nullptr, result, stream);
}

void kl_penalty_backward(const View& logprobs, const View& ref_logprobs, const Mask& mask, int64_t rows, int64_t length,
                         KlEstimator estimator, const float* gradient, float* result, Stream stream) {
  run(logprobs, ref_logprobs, mask, rows, length, estimator, gradient, result, stream);
}

void kl_shaped_rewards(const KlShaping& in, const Sequences& sequences, const Mask& mask, Stream stream) {
  launch(rewards_kernel, sequences.length ? sequences.count : 0, kThreads, stream, in, sequences.length, mask);
}

}  // namespace rlhf_kernels::cuda
