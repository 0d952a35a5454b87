// The running sums of a chunk of a row of logits, read once by the threads of one block.
#pragma once

#include <cfloat>
#include <type_traits>

#include "cuda/device.h"
#include "rlhf_kernels/online_softmax.h"

namespace rlhf_kernels::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVectors = 8;  // that a thread takes of a chunk
constexpr int kStride = kThreads * kVector;
constexpr int kChunk = kStride * kVectors;

template <Dtype kDtype>
constexpr int64_t kSizeOf = kDtype == Dtype::float32 ? 4 : 2;

// How many of a chunk's vectors a thread loads before it uses the first, for the sums: 64 bytes.
template <Dtype kDtype>
constexpr int kSumsAhead = kDtype == Dtype::float32 ? 2 : 4;

// Made on the host: a division of doubles is a function call on a GPU, and registers spill before it.
struct Scale {
  double inverse_temperature;
  float scale;  // log₂ e / τ

  explicit Scale(double temperature)
      : inverse_temperature(1 / temperature), scale(static_cast<float>(kLog2E / temperature)) {}
};

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

// The sums of several threads or warps, in powers of 2 relative to the largest logit of all.
struct Sums {
  float maximum = -INFINITY;
  double sum = 0, weighted = 0;

  __device__ __forceinline__ OnlineSoftmax of_chunk() const { return {maximum, sum, weighted * kLn2}; }
};

// Of a warp's lanes, for its first one. They always add up in the same order.
template <bool kEntropy>
__device__ __forceinline__ Sums warp_sums(Sums own, float scale) {
  float top = own.maximum;
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
  const float shift = own.maximum == -INFINITY ? 0.0f : (own.maximum - top) * scale;
  const double factor = own.maximum == -INFINITY && own.sum == 0 ? 0.0f : exp2f(shift);
  double sum = own.sum * factor, weighted = kEntropy ? (own.weighted + static_cast<double>(shift) * own.sum) * factor : 0;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += shuffle_down(sum, distance);
    if (kEntropy) weighted += shuffle_down(weighted, distance);
  }
  return {top, sum, weighted};
}

// What the warps of a block left of a chunk, merged by one warp, for its first lane.
template <bool kEntropy>
__device__ __forceinline__ OnlineSoftmax merged(const Sums (&of_warps)[kWarps], float scale) {
  const unsigned lane = threadIdx.x % kWarp;
  return warp_sums<kEntropy>(lane < kWarps ? of_warps[lane] : Sums{}, scale).of_chunk();
}

// A warp's share of chunk number `chunk` of the row that begins at logits[base]; scale = log₂ e / τ. All lanes must call it,
// and the first one gets the result. No thread waits for another warp.
template <Dtype kDtype, bool kEntropy>
__device__ __forceinline__ Sums chunk_sums(const void* logits, int64_t base, int64_t vocabulary, int64_t chunk, float scale) {
  const int64_t start = chunk * kChunk + threadIdx.x * kVector;
  // Where the vocabulary is no multiple of a vector, the thread that has the row's end takes it last.
  const int64_t rest = vocabulary / kVector * kVector;
  const bool has_rest = rest < vocabulary && rest / kChunk == chunk && rest % kStride == threadIdx.x * kVector;
  // Loads several of a thread's vectors before it uses the first. In a full chunk no vector needs a check of whether it is
  // whole.
  const auto sums_of = [&](auto full, auto&& fetch) {
    constexpr int ahead = kSumsAhead<kDtype>;
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
    for (int first = 0; first < kVectors; first += ahead) {
      Packed packed[ahead] = {};
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (is_whole(first + i)) packed[i] = fetch(base + start + (first + i) * kStride);
      }
      float maximum = -INFINITY;
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (is_whole(first + i)) maximum = largest_in(packed[i], maximum);
      }
      result.raise(maximum);
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
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
  return warp_sums<kEntropy>({own.maximum, own.sum, own.weighted}, scale);
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
