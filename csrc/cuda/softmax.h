// The running sums of a chunk of a row of logits, read once by the threads of one block.
#pragma once

#include <cfloat>
#include <type_traits>

#include "cuda/device.h"
#include "rlhf_kernels/online_softmax.h"

namespace rlhf_kernels::cuda {

constexpr int kThreads = 256;
constexpr int kVectors = 8;    // that a thread takes of a chunk
constexpr int kSumsAhead = 2;  // how many of them it loads before it uses the first, for the sums
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

// Of chunk number `chunk` of the row that begins at logits[base], relative to its own maximum; scale = log₂ e / τ. Every thread
// of the block must call it; only the first one gets the result.
template <Dtype kDtype, bool kEntropy>
__device__ __forceinline__ OnlineSoftmax chunk_sums(const void* logits, int64_t base, int64_t vocabulary, int64_t chunk,
                                                    float scale) {
  const int64_t start = chunk * kChunk + threadIdx.x * kVector;
  // Where the vocabulary is no multiple of a vector, the thread that has the row's end takes it last.
  const int64_t rest = vocabulary / kVector * kVector;
  const bool has_rest = rest < vocabulary && rest / kChunk == chunk && rest % kStride == threadIdx.x * kVector;
  // Loads several of a thread's vectors before it uses the first. In a full chunk no vector needs a check of whether it is
  // whole.
  const auto sums_of = [&](auto full, auto&& fetch) {
    const auto is_whole = [&](int i) { return full || start + i * kStride + kVector <= vocabulary; };
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
      const Packed end = fetch_one_by_one(logits, kDtype, base + rest, 1, vocabulary - rest, -INFINITY);
      result.raise(largest_in(end, -INFINITY));
      add(end);
    }
    return result;
  };
  const bool aligned = is_aligned(static_cast<const char*>(logits) + base * kSizeOf<kDtype>);
  const auto fetched_by = [&](auto&& fetch) {
    return (chunk + 1) * kChunk <= vocabulary ? sums_of(std::true_type(), fetch) : sums_of(std::false_type(), fetch);
  };
  const auto own = aligned ? fetched_by([&](int64_t at) { return fetch_aligned(logits, kDtype, at); })
                           : fetched_by([&](int64_t at) { return fetch_shifted(logits, kDtype, at); });
  return block_sums(own);
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

}  // namespace rlhf_kernels::cuda
