// Log-prob and entropy of a row in one read of its logits, and their gradient in one read and one write. A block has a row
// for the sums, and for the gradient a chunk of one.

#include "cuda/softmax.h"

namespace rlhf_kernels::cuda {

namespace {

// Vectors that a thread loads before it uses the first, for the gradient.
template <Dtype kDtype>
constexpr int kAhead = kDtype == Dtype::float32 ? 2 : 4;
// Chunks whose sums wait in shared memory until the block merges them: one for each of its warps.
constexpr int kRound = kWarps;

__device__ __forceinline__ bool counts(const LogProbInputs& in, unsigned row, int64_t token) {
  if (in.ignores && token == in.ignored) return false;
  return !in.mask.data || load_mask(in.mask, offset_of(in.mask_places, row), 1);
}

__device__ __forceinline__ bool is_valid(const LogProbInputs& in, int64_t token) { return token >= 0 && token < in.vocabulary; }

template <Dtype kDtype, bool kEntropy>
__global__ void __launch_bounds__(kThreads, 4) sums_kernel(LogProbInputs in, LogProbResults out, Scale scales) {
  __shared__ Sums of_warps[kRound][kWarps];
  __shared__ OnlineSoftmax of_chunks[kRound], all;  // the last is the first thread's alone, which has no registers left for it
  const unsigned row = blockIdx.x;
  if (!counts(in, row, integer_at(in.index, row))) {
    if (threadIdx.x != 0) return;
    out.logprobs[row] = out.maxima[row] = out.log_sums[row] = 0;
    if (kEntropy) out.entropies[row] = 0;
    return;
  }
  const auto [inverse_temperature, scale] = scales;
  const int64_t base = offset_of(in.rows, row);
  const int chunks = static_cast<int>(divide_up(in.vocabulary, kChunk)), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) all = {};
  for (int first = 0; first < chunks; first += kRound) {
    const int some = chunks - first < kRound ? chunks - first : kRound;
#pragma unroll 1
    for (int c = 0; c < some; ++c) {
      const Sums mine = chunk_sums<kDtype, kEntropy>(in.logits, base, in.vocabulary, first + c, scale);
      if (lane == 0) of_warps[c][warp] = mine;
    }
    __syncthreads();
    if (warp < some) {
      const OnlineSoftmax sums = merged<kEntropy>(of_warps[warp], scale);
      if (lane == 0) of_chunks[warp] = sums;
    }
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (int c = 0; c < some; ++c) merge(all, of_chunks[c], inverse_temperature);
  }
  if (threadIdx.x != 0) return;
  const int64_t token = integer_at(in.index, row);  // once more, so that no register holds it all the time
  const float logit = is_valid(in, token) ? load(in.logits, kDtype, base + token) : NAN;
  out.logprobs[row] = static_cast<float>(rlhf_kernels::log_prob(all, logit, inverse_temperature));
  out.maxima[row] = all.maximum;
  out.log_sums[row] = static_cast<float>(log(all.sum));
  if (kEntropy) out.entropies[row] = static_cast<float>(entropy(all));
}

template <Dtype kDtype, bool kEntropy>
__global__ void __launch_bounds__(kThreads, 4) gradient_kernel(LogProbInputs in, LogProbGradient out,
                                                               double inverse_temperature, unsigned chunks) {
  const unsigned row = blockIdx.x / chunks;
  const int64_t chunk = blockIdx.x % chunks, from = offset_of(in.rows, row), to = offset_of(out.rows, row);
  const auto* logits = static_cast<const char*>(in.logits) + from * kSizeOf<kDtype>;
  const auto* gradients = static_cast<const char*>(out.gradient) + to * kSizeOf<kDtype>;
  // Vectors are aligned to 16 bytes of the gradient, so that the first may begin before the row does.
  const int64_t lead = reinterpret_cast<uintptr_t>(gradients) % 16 / kSizeOf<kDtype>;
  const bool aligned = is_aligned(logits - lead * kSizeOf<kDtype>);
  const int64_t token = integer_at(in.index, row);
  const bool wanted = counts(in, row, token), valid = is_valid(in, token);
  const float maximum = out.maxima[row], log_sum = out.log_sums[row], row_entropy = kEntropy ? out.entropies[row] : 0;
  // A token of −1 is in another part of the vocabulary.
  const float grad_logprob = valid || token == -1 ? out.grad_logprobs[row] : 0;
  const float grad_entropy = kEntropy ? out.grad_entropies[row] : 0;
  const LogitGradient<float> gradient(maximum, log_sum, row_entropy, grad_logprob, grad_entropy, inverse_temperature);
  // One thread reads the chosen logit before another may write its gradient over it.
  __shared__ float of_chosen;
  const int64_t begin = chunk * kChunk - lead;
  // Within the chunk 32 bits are enough. Far from all of its entries where the token is elsewhere.
  const int chosen = wanted && valid && token >= begin && token < begin + kChunk ? static_cast<int>(token - begin) : -kVector;
  if (threadIdx.x == 0 && chosen >= 0) {
    of_chosen = static_cast<float>(chosen_logit_gradient(load(in.logits, kDtype, from + token), maximum, log_sum, row_entropy,
                                                         grad_logprob, grad_entropy, inverse_temperature));
  }
  __syncthreads();
  const auto of = [&](float logit) {
    if constexpr (kEntropy) return gradient.template of<true>(logit);
    // As LogitGradient, but for what comes out as 0 anyway.
    return power_of_two_or_0(fmaf(logit - gradient.maximum, gradient.scale, -gradient.log2_sum)) * gradient.offset;
  };
  constexpr int ahead = kAhead<kDtype>;
#pragma unroll 1
  for (int first = 0; first < kVectors; first += ahead) {
    Packed packed[ahead];
    // Of the thread's vectors, from the chunk's first entry on.
    const auto offset = [&](int i) { return static_cast<int>(threadIdx.x) * kVector + (first + i) * kStride; };
    const auto is_whole = [&](int i) { return begin + offset(i) >= 0 && begin + offset(i) + kVector <= in.vocabulary; };
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (!wanted || !is_whole(i)) continue;
      const int64_t at = from + begin + offset(i);
      packed[i] = aligned ? fetch_aligned(in.logits, kDtype, at) : fetch_shifted(in.logits, kDtype, at);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int64_t at = begin + offset(i);
      const unsigned slot = static_cast<unsigned>(chosen - offset(i));  // below kVector if the token is in this vector
      if (is_whole(i)) {
        float x[kVector] = {};
        if (wanted) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) x[j] = of(packed[i].of(j, kDtype));
          if (slot < kVector) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) x[j] = slot == static_cast<unsigned>(j) ? of_chosen : x[j];
          }
        }
        store_vector(out.gradient, kDtype, to + at, kVector, x);
        continue;
      }
      for (int64_t j = at < 0 ? 0 : at; j < at + kVector && j < in.vocabulary; ++j) {
        const bool is_chosen = slot == static_cast<unsigned>(j - at);
        const float x = !wanted ? 0.0f : is_chosen ? of_chosen : of(load(in.logits, kDtype, from + j));
        store(out.gradient, kDtype, to + j, x);
      }
    }
  }
}

}  // namespace

void log_prob(const LogProbInputs& in, const LogProbResults& out, int64_t rows, Stream stream) {
  for_dtype(in.dtype, [&](auto dtype) {
    const auto kernel = out.entropies ? sums_kernel<decltype(dtype)::value, true> : sums_kernel<decltype(dtype)::value, false>;
    launch(kernel, rows, kThreads, stream, in, out, Scale(in.temperature));
  });
}

void log_prob_backward(const LogProbInputs& in, const LogProbGradient& out, int64_t rows, Stream stream) {
  // A row that does not begin at a multiple of 16 bytes may need one vector more.
  const int64_t chunks = divide_up(in.vocabulary + kVector - 1, kChunk);
  for_dtype(in.dtype, [&](auto dtype) {
    const auto kernel = out.grad_entropies ? gradient_kernel<decltype(dtype)::value, true>
                                           : gradient_kernel<decltype(dtype)::value, false>;
    launch(kernel, rows * chunks, kThreads, stream, in, out, 1 / in.temperature, chunks);
  });
}

}  // namespace rlhf_kernels::cuda
