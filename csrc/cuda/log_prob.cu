// Log-prob and entropy of a row in one read of its logits, and their gradient in one read and one write. Each block takes
// a chunk of a row; chunks have one size, so that a few long rows keep the GPU as busy as many. The last block of a row to
// finish merges the row's chunks, in order.

#include "cuda/softmax.h"

namespace rlhf_kernels::cuda {

namespace {

constexpr int kAhead = 4;  // vectors that a thread loads before it uses the first, for the gradient

__device__ __forceinline__ void finish(const LogProbArguments& in, const LogProbResults& out, int64_t row,
                                       int64_t base, const OnlineSoftmax& sums) {
  const int64_t token = in.index[row];
  const bool valid = token >= 0 && token < in.vocabulary;
  const double inverse_temperature = 1 / in.temperature;
  const float logit = valid ? load(in.logits, in.dtype, base + token) : NAN;
  out.logprobs[row] = static_cast<float>(rlhf_kernels::log_prob(sums, logit, inverse_temperature));
  out.maxima[row] = sums.maximum;
  out.log_sums[row] = static_cast<float>(log(sums.sum));
  if (out.entropies) out.entropies[row] = static_cast<float>(entropy(sums));
}

template <Dtype kDtype, bool kEntropy>
__global__ void __launch_bounds__(kThreads) sums_kernel(LogProbArguments in, LogProbResults out, unsigned chunks,
                                                        OnlineSoftmax* sums, unsigned* tickets) {
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  if (in.wanted[row] == 0) {
    if (chunk != 0 || threadIdx.x != 0) return;
    out.logprobs[row] = out.maxima[row] = out.log_sums[row] = 0;
    if (out.entropies) out.entropies[row] = 0;
    return;
  }
  const int64_t base = in.rows.offset(row);
  const float scale = static_cast<float>(kLog2E / in.temperature);
  OnlineSoftmax mine = chunk_sums<kDtype, kEntropy>(in.logits, base, in.vocabulary, chunk, scale);
  if (threadIdx.x != 0) return;
  if (chunks > 1) {
    sums[blockIdx.x] = mine;
    __threadfence();
    if (atomicAdd(tickets + row, 1u) != chunks - 1) return;
    __threadfence();
    mine = {};
    for (unsigned i = 0; i < chunks; ++i) merge(mine, sums[row * chunks + i], 1 / in.temperature);
  }
  finish(in, out, row, base, mine);
}

template <Dtype kDtype, bool kEntropy>
__global__ void __launch_bounds__(kThreads, 3) gradient_kernel(LogProbArguments in, LogProbGradient out, unsigned chunks) {
  const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t from = in.rows.offset(row), to = out.rows.offset(row);
  const auto* logits = static_cast<const char*>(in.logits) + from * kSizeOf<kDtype>;
  const auto* gradients = static_cast<const char*>(out.gradient) + to * kSizeOf<kDtype>;
  // Vectors are aligned to 16 bytes of the gradient, so that the first may begin before the row does.
  const int64_t lead = reinterpret_cast<uintptr_t>(gradients) % 16 / kSizeOf<kDtype>;
  const bool aligned = is_aligned(logits - lead * kSizeOf<kDtype>);
  const bool wanted = in.wanted[row] != 0;
  const int64_t token = in.index[row];
  const bool valid = token >= 0 && token < in.vocabulary;
  const float maximum = out.maxima[row], log_sum = out.log_sums[row], row_entropy = kEntropy ? out.entropies[row] : 0;
  // A token of −1 is in another part of the vocabulary.
  const float grad_logprob = valid || token == -1 ? out.grad_logprobs[row] : 0;
  const float grad_entropy = kEntropy ? out.grad_entropies[row] : 0;
  const rlhf_kernels::LogitGradient<float> gradient(maximum, log_sum, row_entropy, grad_logprob, grad_entropy,
                                                    in.temperature);
  // One thread reads the chosen logit before another may write its gradient over it.
  __shared__ float chosen;
  const int64_t begin = chunk * kChunk - lead;
  if (threadIdx.x == 0 && wanted && valid && token >= begin && token < begin + kChunk) {
    chosen = static_cast<float>(chosen_logit_gradient(load(in.logits, kDtype, from + token), maximum, log_sum, row_entropy,
                                                      grad_logprob, grad_entropy, in.temperature));
  }
  __syncthreads();
  const auto of = [&](int64_t at, float logit) { return at == token ? chosen : gradient.template of<kEntropy>(logit); };
  const int64_t start = begin + threadIdx.x * kVector;
#pragma unroll 1
  for (int first = 0; first < kVectors; first += kAhead) {
    Packed packed[kAhead];
    const auto place = [&](int i) { return start + (first + i) * kStride; };
    const auto is_whole = [&](int64_t at) { return at >= 0 && at + kVector <= in.vocabulary; };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (!wanted || !is_whole(place(i))) continue;
      packed[i] = aligned ? fetch_aligned(in.logits, kDtype, from + place(i))
                          : fetch_shifted(in.logits, kDtype, from + place(i));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = place(i);
      if (is_whole(at)) {
        float x[kVector] = {};
        if (wanted) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) x[j] = of(at + j, packed[i].of(j, kDtype));
        }
        store_vector(out.gradient, kDtype, to + at, kVector, x);
        continue;
      }
      for (int64_t j = at < 0 ? 0 : at; j < at + kVector && j < in.vocabulary; ++j) {
        store(out.gradient, kDtype, to + j, wanted ? of(j, load(in.logits, kDtype, from + j)) : 0.0f);
      }
    }
  }
}

}  // namespace

int64_t vocabulary_chunks(int64_t vocabulary) { return divide_up(vocabulary, kChunk); }

void log_prob(const LogProbArguments& in, const LogProbResults& out, int64_t rows, OnlineSoftmax* sums,
              unsigned* tickets, Stream stream) {
  const int64_t chunks = vocabulary_chunks(in.vocabulary);
  for_dtype(in.dtype, [&](auto dtype) {
    const auto kernel = out.entropies ? sums_kernel<decltype(dtype)::value, true> : sums_kernel<decltype(dtype)::value, false>;
    launch(kernel, rows * chunks, kThreads, stream, in, out, chunks, sums, tickets);
  });
}

void log_prob_backward(const LogProbArguments& in, const LogProbGradient& out, int64_t rows, Stream stream) {
  // A row that does not begin at a multiple of 16 bytes may need one vector more.
  const int64_t chunks = vocabulary_chunks(in.vocabulary + kVector - 1);
  for_dtype(in.dtype, [&](auto dtype) {
    const auto kernel = out.grad_entropies ? gradient_kernel<decltype(dtype)::value, true>
                                           : gradient_kernel<decltype(dtype)::value, false>;
    launch(kernel, rows * chunks, kThreads, stream, in, out, chunks);
  });
}

}  // namespace rlhf_kernels::cuda
