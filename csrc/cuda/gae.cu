// Advantages: a block per sequence, from its last position to its first, as a scan of affine maps (rlhf_kernels/gae.h);
// whitening in a second launch, when the moments of all sequences are complete.
//
// Which lane and warp takes a position depends on its place in the sequence alone, and the state goes from warp to warp.
// So a sequence's results have the same bits in any batch and with any size of block.

#include "cuda/device.h"
#include "rlhf_kernels/gae.h"

namespace rlhf_kernels::cuda {

namespace {

constexpr int kMostThreads = 256;
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr int kWhitenThreads = 256;

// The moments of at most eight advantages.
__device__ __forceinline__ Moments moments_of(const float (&advantages)[kVector], unsigned counts) {
  Moments result;
  for (int i = 0; i < kVector; ++i) {
    if (!(counts >> i & 1)) continue;
    result.count += 1;
    result.mean += advantages[i];
  }
  if (result.count == 0) return result;
  result.mean /= result.count;
  for (int i = 0; i < kVector; ++i) {
    const double distance = (counts >> i & 1) ? advantages[i] - result.mean : 0.0;
    result.squares = fma(distance, distance, result.squares);
  }
  return result;
}

// Several blocks share a multiprocessor, so that some load while others wait in their scan.
template <bool kShaped>
__global__ void __launch_bounds__(kMostThreads, kShaped ? 2 : 3) sequence_kernel(GaeArguments in, Mask mask,
                                                                                        KlShaping shaping) {
  __shared__ GaeMap totals[2][kMostWarps];
  __shared__ Moments between[kMostWarps];
  const int64_t sequence = blockIdx.x;
  const Span span = span_of(in.sequences, sequence);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const double gamma_lambda = in.gamma * in.lambda;
  GaeState state{0, in.bootstrap ? in.gamma * in.bootstrap[sequence] : 0, false};
  double score = 0;
  if (kShaped) {
    score = clipped_score(shaping.scores[sequence], shaping.score_clip);
    state.next += score;
  }
  Moments moments;
  const int64_t chunk = int64_t{blockDim.x} * kVector;
  int parity = 0;
  for (int64_t start = (span.length - 1) / chunk * chunk; start >= 0 && span.length > 0; start -= chunk) {
    // The first thread has the rightmost positions.
    const int64_t t = start + int64_t{blockDim.x - 1 - threadIdx.x} * kVector, flat = span.flat + t;
    const int64_t count = span.length - t;
    const unsigned counts = load_mask(mask, flat, count);
    const Packed packed_values = fetch(in.values, span.row, span.column + t, count);
    Packed packed_rewards, packed_logprobs, packed_ref;
    if (kShaped) {
      packed_logprobs = fetch(shaping.logprobs, span.row, span.column + t, count);
      packed_ref = fetch(shaping.ref_logprobs, span.row, span.column + t, count);
    } else {
      packed_rewards = fetch(in.rewards, span.row, span.column + t, count);
    }
    float values[kVector], rewards[kVector], kls[kVector];
    packed_values.unpack(in.values.dtype, values);
    if (kShaped) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float logprob = packed_logprobs.of(i, shaping.logprobs.dtype), ref = packed_ref.of(i, shaping.ref_logprobs.dtype);
        kls[i] = counts >> i & 1 ? rlhf_kernels::kl_penalty(logprob, ref, shaping.estimator) : 0.0f;
      }
    } else {
      packed_rewards.unpack(in.rewards.dtype, rewards);
    }
    const auto reward = [&](int i) {
      return kShaped ? -shaping.beta * static_cast<double>(kls[i]) : static_cast<double>(rewards[i]);
    };
    GaeMap map;
#pragma unroll
    for (int i = kVector - 1; i >= 0; --i) {
      if (counts >> i & 1) map.take(reward(i), values[i], in.gamma, gamma_lambda);
    }
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const GaeMap right = shuffle_up(map, distance);
      if (lane >= static_cast<unsigned>(distance)) map = joined(map, right);
    }
    if (lane == kWarp - 1) totals[parity][warp] = map;
    __syncthreads();
    GaeState own = state;
    for (unsigned w = 0; w < warps; ++w) {
      if (w == warp) own = state;
      state = totals[parity][w].applied(state);
    }
    parity ^= 1;  // the next round writes where nobody reads any more
    const GaeMap before = shuffle_up(map, 1);
    if (lane > 0) own = before.applied(own);
    float advantages[kVector], returns[kVector];
#pragma unroll
    for (int i = kVector - 1; i >= 0; --i) {
      const bool here = counts >> i & 1;
      if (kShaped) rewards[i] = here ? static_cast<float>((own.seen ? 0 : score) + reward(i)) : 0.0f;
      if (here) {
        const double delta = gae_delta(reward(i), values[i], own.next);
        own = {gae_advantage(delta, gamma_lambda, own.advantage), in.gamma * values[i], true};
      }
      advantages[i] = here ? static_cast<float>(own.advantage) : 0.0f;
      returns[i] = here ? static_cast<float>(own.advantage + values[i]) : 0.0f;
    }
    store_vector(in.advantages, Dtype::float32, flat, count, advantages);
    store_vector(in.returns, Dtype::float32, flat, count, returns);
    if (kShaped) {
      store_vector(shaping.rewards, Dtype::float32, flat, count, rewards);
      store_vector(shaping.kl, Dtype::float32, flat, count, kls);
    }
    if (in.moments) merge(moments, moments_of(advantages, counts));
  }
  if (!in.moments) return;
  moments = block_merge(moments, between, [](Moments& a, const Moments& b) { merge(a, b); });
  if (threadIdx.x == 0) in.moments[sequence] = moments;
}

// Every block pools the moments of all sequences, in one order, and whitens its share.
__global__ void __launch_bounds__(kWhitenThreads) whiten_kernel(float* advantages, Mask mask, const Moments* moments,
                                                                bool unbiased, int64_t sequences, int64_t size) {
  __shared__ Moments between[kWhitenThreads / kWarp];
  __shared__ double mean, scale;
  Moments all;
  for (int64_t b = threadIdx.x; b < sequences; b += blockDim.x) merge(all, moments[b]);
  all = block_merge(all, between, [](Moments& a, const Moments& b) { merge(a, b); });
  if (threadIdx.x == 0) {
    mean = all.mean;
    scale = whitening_scale(all, unbiased);
  }
  __syncthreads();
  const int64_t stride = int64_t{gridDim.x} * blockDim.x * kVector;
  for (int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kVector; at < size; at += stride) {
    const unsigned counts = load_mask(mask, at, size - at);
    float x[kVector];
    fetch(advantages, at, size - at).unpack(Dtype::float32, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = counts >> i & 1 ? static_cast<float>((x[i] - mean) * scale) : 0.0f;
    store_vector(advantages, Dtype::float32, at, size - at, x);
  }
}

template <bool kShaped>
void run(const GaeArguments& in, const Mask& mask, const KlShaping& shaping, int64_t size, Stream stream) {
  // A thread for every eight positions of a sequence, in whole warps. Packed sequences may have any length.
  const int64_t longest = divide_up(in.sequences.length, kVector);
  // Many sequences get small blocks, of which twice as many fit a GPU at a time: else the last ones would run alone.
  constexpr int64_t many = 256;
  const int most = in.sequences.count > many ? kMostThreads / 2 : kMostThreads;
  const int threads = static_cast<int>(longest >= most ? most : divide_up(longest < 1 ? 1 : longest, kWarp) * kWarp);
  launch(sequence_kernel<kShaped>, in.sequences.count, in.sequences.boundaries ? kMostThreads / 2 : threads, stream, in,
         mask, shaping);
  if (!in.moments || size == 0) return;
  const int64_t blocks = divide_up(size, kWhitenThreads * kVector);
  launch(whiten_kernel, blocks < kMostBlocks ? blocks : kMostBlocks, kWhitenThreads, stream, in.advantages, mask,
         in.moments, in.unbiased, in.sequences.count, size);
}

}  // namespace

void gae(const GaeArguments& in, const Mask& mask, int64_t size, Stream stream) { run<false>(in, mask, {}, size, stream); }

void ppo_advantages(const GaeArguments& in, const Mask& mask, const KlShaping& shaping, int64_t size, Stream stream) {
  run<true>(in, mask, shaping, size, stream);
}

}  // namespace rlhf_kernels::cuda
