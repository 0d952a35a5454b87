// Tokens drawn from rows of logits, with their log-probs. Each block sums a chunk of a row as for the log-probs, and the
// last block of a row to finish draws its token: it finds the chunk that holds the token, and reads that chunk a second time.
// Rows are often few here, so that a block for each would leave most of a GPU idle.

#include "rlhf_kernels/sampling.h"

#include "cuda/softmax.h"

namespace rlhf_kernels::cuda {

namespace {

// A chunk's sums, and for which launch they are there. The memory may hold anything before, but not the number of a launch
// that has yet to come. So no launch of its own has to clear it.
struct Chunk {
  OnlineSoftmax sums;
  uint64_t launch;
};

// Whether all chunks of a row are there, this block's among them. The last block to ask is told so, and one beside it may be
// too: both then write the same results.
__device__ __forceinline__ bool is_complete(Chunk* row, unsigned own, const OnlineSoftmax& sums, unsigned chunks,
                                            uint64_t launch) {
  if (threadIdx.x == 0) {
    row[own].sums = sums;
    __threadfence();
    *static_cast<volatile uint64_t*>(&row[own].launch) = launch;
  }
  __syncthreads();
  __threadfence();  // of two blocks, the one that comes here last sees what the other has stored
  bool there = true;
  for (unsigned i = threadIdx.x; i < chunks; i += kThreads) {
    there = there && *static_cast<volatile const uint64_t*>(&row[i].launch) == launch;
  }
  there = __syncthreads_and(there);
  __threadfence();
  return there;
}

// Where in a row its token is, as far as the first thread has found out, for the others.
struct Place {
  int64_t chunk;  // −1: no token can be drawn
  double target;  // of the cumulated probability, and what of it comes before the chunk, then the warp
  double passed;
  int64_t part;   // of the chunk: a warp's share of one of its kVectors strides
  float maximum;  // of the row; with `sum`, for the log-prob
  double sum;
};

// Relative to the row's maximum, what is 1 relative to a chunk's.
__device__ __forceinline__ double factor_of(const OnlineSoftmax& chunk, float maximum, double inverse_temperature) {
  if (chunk.maximum == maximum) return 1;
  return exp((static_cast<double>(chunk.maximum) - maximum) * inverse_temperature);
}

__device__ __forceinline__ Place chunk_of(const SamplingInputs& in, unsigned row, int64_t chunks, const Chunk* of_row,
                                          double inverse_temperature) {
  const auto sums = [&](int64_t i) -> const OnlineSoftmax& { return of_row[i].sums; };
  OnlineSoftmax all;
  for (int64_t i = 0; i < chunks; ++i) merge(all, sums(i), inverse_temperature);
  Place place{-1, 0, 0, 0, all.maximum, all.sum};
  if (!(all.sum > 0 && all.sum < INFINITY)) return place;  // NaN, or nothing above −inf
  if (in.temperature == 0) {
    for (place.chunk = 0; sums(place.chunk).maximum != all.maximum;) ++place.chunk;
    return place;
  }
  const auto weight = [&](int64_t i) {
    return sums(i).sum > 0 ? sums(i).sum * factor_of(sums(i), all.maximum, inverse_temperature) : 0.0;
  };
  double total = 0;
  for (int64_t i = 0; i < chunks; ++i) total += weight(i);
  place.target = uniform(in.seed, integer_at(in.streams, row), integer_at(in.steps, row)) * total;
  place.chunk = part_at(place.target, place.passed, chunks, weight);
  return place;
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads, 4) sample_kernel(SamplingInputs in, SamplingResults out, Scale scales,
                                                          unsigned chunks, Chunk* all_chunks, uint64_t launch) {
  __shared__ Sums of_warps[kWarps];
  const unsigned row = blockIdx.x / chunks;
  const int64_t base = offset_of(in.rows, row);
  const auto [inverse_temperature, scale] = scales;
  const Sums mine = chunk_sums<kDtype, false>(in.logits, base, in.vocabulary, blockIdx.x % chunks, scale);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  OnlineSoftmax of_chunk;
  if (threadIdx.x < kWarp) of_chunk = merged<false>(of_warps, scale);
  Chunk* const sums = all_chunks + int64_t{row} * chunks;
  if (!is_complete(sums, blockIdx.x % chunks, of_chunk, chunks, launch)) return;

  __shared__ Place place;
  if (threadIdx.x == 0) {
    // A CUDA graph launches with the same number again and again.
    for (unsigned i = 0; i < chunks; ++i) sums[i].launch = 0;
    place = chunk_of(in, row, chunks, sums, inverse_temperature);
    if (place.chunk < 0) {
      out.tokens[row] = -1;
      out.logprobs[row] = NAN;
    }
  }
  __syncthreads();
  if (place.chunk < 0) return;
  const auto finish = [&](int64_t token) {
    out.tokens[row] = token;
    out.logprobs[row] = static_cast<float>(rlhf_kernels::log_prob(OnlineSoftmax{place.maximum, place.sum},
                                                                  load(in.logits, kDtype, base + token), inverse_temperature));
  };
  // The thread's vector in one of the chunk's strides; −inf after the end of the row.
  const auto fetched = [&](int64_t at, float (&x)[kVector]) {
    const int64_t count = in.vocabulary - at;
    const Packed packed = count >= kVector ? fetch_shifted(in.logits, kDtype, base + at)
                                           : fetch_one_by_one(in.logits, kDtype, base + at, 1, count, -INFINITY);
    packed.unpack(kDtype, x);
  };
  const int64_t start = place.chunk * kChunk;

  if (in.temperature == 0) {
    __shared__ int64_t between[kWarps];
    int64_t first = in.vocabulary;
#pragma unroll 1
    for (int i = kVectors - 1; i >= 0; --i) {
      const int64_t at = start + i * kStride + threadIdx.x * kVector;
      float x[kVector];
      fetched(at, x);
#pragma unroll
      for (int j = kVector - 1; j >= 0; --j) {
        if (x[j] == place.maximum) first = at + j;
      }
    }
    first = block_merge(first, between, [](int64_t& a, int64_t b) { a = b < a ? b : a; });
    if (threadIdx.x == 0) finish(first);
    return;
  }

  // Weights relative to the chunk's own maximum: relative to the row's they might all round to 0.
  const OnlineSoftmax& of_place = sums[place.chunk].sums;
  const float maximum = of_place.maximum;
  const double factor = factor_of(of_place, place.maximum, inverse_temperature);
  const auto weight_of = [&](float logit) { return static_cast<double>(power_of_two_or_0((logit - maximum) * scale)); };
  const auto vector_sum = [&](int64_t at) {
    float x[kVector];
    fetched(at, x);
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum += weight_of(x[j]);
    return sum;
  };
  __shared__ double parts[kVectors * kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int i = 0; i < kVectors; ++i) {
    double sum = vector_sum(start + i * kStride + threadIdx.x * kVector);
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += shuffle_down(sum, distance);
    if (lane == 0) parts[i * kWarps + warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    place.part = part_at(place.target, place.passed, kVectors * kWarps, [&](int64_t i) { return factor * parts[i]; });
  }
  __syncthreads();
  if (place.part % kWarps != warp) return;
  const int64_t of_warp = start + place.part / kWarps * kStride + warp * kWarp * kVector;
  const double own = vector_sum(of_warp + lane * kVector);
  double passed = place.passed;
  const int64_t chosen = part_at(place.target, passed, kWarp, [&](int64_t i) {
    return factor * shuffle(own, static_cast<int>(i), kWarp);
  });
  if (chosen != lane) return;
  const int64_t at = of_warp + lane * kVector, count = in.vocabulary - at;
  finish(at + part_at(place.target, passed, count < kVector ? count : kVector, [&](int64_t i) {
    return factor * weight_of(load(in.logits, kDtype, base + at + i));
  }));
}

}  // namespace

int64_t sampling_workspace(int64_t rows, int64_t vocabulary) {
  return rows * divide_up(vocabulary, kChunk) * static_cast<int64_t>(sizeof(Chunk));
}

void sample_tokens(const SamplingInputs& in, const SamplingResults& out, int64_t rows, void* workspace, uint64_t number,
                   Stream stream) {
  const int64_t chunks = divide_up(in.vocabulary, kChunk);
  for_dtype(in.dtype, [&](auto dtype) {
    launch(sample_kernel<decltype(dtype)::value>, rows * chunks, kThreads, stream, in, out,
           Scale(in.temperature == 0 ? 1.0 : in.temperature), chunks, static_cast<Chunk*>(workspace), number);
  });
}

}  // namespace rlhf_kernels::cuda
