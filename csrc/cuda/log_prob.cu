// Log-prob and entropy of a row in one read of its logits, and their gradient in one read and one write. Each block takes
// a chunk of a row; chunks have one size, so that a few long rows keep the GPU as busy as many. The last block of a row to
// finish merges the row's chunks, in order.

#include <cfloat>
#include <type_traits>

#include "cuda/device.h"
#include "rlhf_kernels/online_softmax.h"

namespace rlhf_kernels::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 8;    // that a thread takes of a chunk
constexpr int kSumsAhead = 2;  // how many of them it loads before it uses the first, for the sums
constexpr int kAhead = 4;      // the same for the gradient
constexpr int kStride = kThreads * kVector;
constexpr int kChunk = kStride * kVectors;

template <Dtype kDtype>
constexpr int64_t kSizeOf = kDtype == Dtype::float32 ? 4 : 2;

// The running sums of one thread's logits, relative to the largest it has seen, in powers of 2.
template <bool kEntropy>
struct ThreadSums {
  float scale, maximum = -INFINITY, sum = 0, weighted = 0;

  // To be called before logits as large as this one are added.
  __device__ __forceinline__ void raise(float to) {
    if (to <= maximum) return;
    if (maximum != -INFINITY) {
      const float shift = (maximum - to) * scale, factor = power_of_two_or_0(shift);
      if (kEntropy) weighted = (weighted + shift * sum) * factor;
      sum *= factor;
    }
    maximum = to;
  }

  __device__ __forceinline__ void add(const float (&x)[kVector]) {
    // As long as all logits were −inf, any finite reference gives their tokens probability 0.
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float d = (x[i] - reference) * scale, e = power_of_two_or_0(d);
      sum += e;
      if (kEntropy) weighted += e * fmaxf(d, -FLT_MAX);  // not 0·inf
    }
  }
};

__device__ __forceinline__ float largest_of(const float (&x)[kVector], float so_far) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) so_far = fmaxf(so_far, x[i]);
  return so_far;
}

// The sums of the whole block, relative to its maximum. Only the first thread gets them.
template <bool kEntropy>
__device__ __forceinline__ OnlineSoftmax block_sums(const ThreadSums<kEntropy>& own) {
  __shared__ float maxima[kThreads / kWarp];
  __shared__ float maximum;
  struct Pair {
    double sum, weighted;
  };
  __shared__ Pair between[kThreads / kWarp];
  const float top = block_merge(own.maximum, maxima, [](float& a, float b) { a = fmaxf(a, b); });
  if (threadIdx.x == 0) maximum = top;
  __syncthreads();
  const float shift = own.maximum == -INFINITY ? 0.0f : (own.maximum - maximum) * own.scale;
  const double factor = own.maximum == -INFINITY && own.sum == 0 ? 0.0f : exp2f(shift);
  Pair pair{own.sum * factor, kEntropy ? (own.weighted + static_cast<double>(shift) * own.sum) * factor : 0};
  pair = block_merge(pair, between, [](Pair& a, const Pair& b) {
    a.sum += b.sum;
    a.weighted += b.weighted;
  });
  return {maximum, pair.sum, pair.weighted * kLn2};
}

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
  const int64_t base = in.rows.offset(row), start = chunk * kChunk + threadIdx.x * kVector;
  const float scale = static_cast<float>(kLog2E / in.temperature);
  // Where the vocabulary is no multiple of a vector, the thread that has the row's end takes it last.
  const int64_t rest = in.vocabulary / kVector * kVector;
  const bool has_rest = rest < in.vocabulary && rest / kChunk == chunk && rest % kStride == threadIdx.x * kVector;
  // Loads several of a thread's vectors before it uses the first. In a full chunk no vector needs a check of whether it is
  // whole.
  const auto sums_of = [&](auto full, auto&& fetch) {
    const auto is_whole = [&](int i) { return full || start + i * kStride + kVector <= in.vocabulary; };
    ThreadSums<kEntropy> result{scale};
    float x[kVector];
    const auto largest_in = [&](const Packed& from, float so_far) {
      from.unpack(kDtype, x);
      return largest_of(x, so_far);
    };
    const auto add = [&](const Packed& from) {
      from.unpack(kDtype, x);
      result.add(x);
    };
#pragma unroll 1
    for (int first = 0; first < kVectors; first += kSumsAhead) {
      Packed packed[kSumsAhead] = {};
#pragma unroll
      for (int i = 0; i < kSumsAhead; ++i) {
        if (is_whole(first + i)) packed[i] = fetch(base + start + (first + i) * kStride);
      }
      float maximum = -INFINITY;
#pragma unroll
      for (int i = 0; i < kSumsAhead; ++i) {
        if (is_whole(first + i)) maximum = largest_in(packed[i], maximum);
      }
      result.raise(maximum);
#pragma unroll
      for (int i = 0; i < kSumsAhead; ++i) {
        if (is_whole(first + i)) add(packed[i]);
      }
    }
    if (has_rest) {
      const Packed end = fetch_one_by_one(in.logits, kDtype, base + rest, 1, in.vocabulary - rest, -INFINITY);
      result.raise(largest_in(end, -INFINITY));
      add(end);
    }
    return result;
  };
  const bool aligned = is_aligned(static_cast<const char*>(in.logits) + base * kSizeOf<kDtype>);
  const auto fetched_by = [&](auto&& fetch) {
    return (chunk + 1) * kChunk <= in.vocabulary ? sums_of(std::true_type(), fetch) : sums_of(std::false_type(), fetch);
  };
  const auto own = aligned ? fetched_by([&](int64_t at) { return fetch_aligned(in.logits, kDtype, at); })
                           : fetched_by([&](int64_t at) { return fetch_shifted(in.logits, kDtype, at); });
  OnlineSoftmax mine = block_sums(own);
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
  const float grad_logprob = valid ? out.grad_logprobs[row] : 0, grad_entropy = kEntropy ? out.grad_entropies[row] : 0;
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

template <class Function>
void for_dtype(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::float32:
      return function(std::integral_constant<Dtype, Dtype::float32>());
    case Dtype::bfloat16:
      return function(std::integral_constant<Dtype, Dtype::bfloat16>());
    case Dtype::float16:
      return function(std::integral_constant<Dtype, Dtype::float16>());
  }
}

}  // namespace

int64_t log_prob_chunks(int64_t vocabulary) { return divide_up(vocabulary, kChunk); }

void log_prob(const LogProbArguments& in, const LogProbResults& out, int64_t rows, OnlineSoftmax* sums,
              unsigned* tickets, Stream stream) {
  const int64_t chunks = log_prob_chunks(in.vocabulary);
  for_dtype(in.dtype, [&](auto dtype) {
    const auto kernel = out.entropies ? sums_kernel<decltype(dtype)::value, true> : sums_kernel<decltype(dtype)::value, false>;
    launch(kernel, rows * chunks, kThreads, stream, in, out, chunks, sums, tickets);
  });
}

void log_prob_backward(const LogProbArguments& in, const LogProbGradient& out, int64_t rows, Stream stream) {
  // A row that does not begin at a multiple of 16 bytes may need one vector more.
  const int64_t chunks = log_prob_chunks(in.vocabulary + kVector - 1);
  for_dtype(in.dtype, [&](auto dtype) {
    const auto kernel = out.grad_entropies ? gradient_kernel<decltype(dtype)::value, true>
                                           : gradient_kernel<decltype(dtype)::value, false>;
    launch(kernel, rows * chunks, kThreads, stream, in, out, chunks);
  });
}

}  // namespace rlhf_kernels::cuda
