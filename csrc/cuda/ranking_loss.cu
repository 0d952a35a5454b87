// The pairwise ranking loss. A prompt gets a lane for each of its completions, and every lane compares its completion with
// all others, so that no gradient is summed across lanes. The mean over prompts, and with it a factor of the gradient, need
// the number of prompts that have a pair. A second launch multiplies by it.

#include "cuda/device.h"
#include "rlhf_kernels/ranking_loss.h"

namespace rlhf_kernels::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

struct Sums {
  double loss = 0, right = 0;
  int64_t prompts = 0;
};

__device__ __forceinline__ void add(Sums& a, const Sums& b) {
  a.loss += b.loss;
  a.right += b.right;
  a.prompts += b.prompts;
}

// Sums of one completion: over all pairs that it wins, and of the gradient over all pairs that it is in.
struct Completion {
  double loss = 0;
  float right = 0, pairs = 0, gradient = 0, lost = 0;  // lost: by the additions of the gradient (Kahan 1965)
};

struct Entry {
  float score;
  bool exists;
  int64_t rank;
};

__device__ __forceinline__ Entry entry(const RankingLoss& in, int64_t base, int64_t i, int64_t length) {
  if (i >= length || !load_mask(in.mask, base + i, 1)) return {0.0f, false, 0};
  return {load(in.scores, in.dtype, base + i), true, in.ranks[base + i]};
}

__global__ void __launch_bounds__(kThreads, 4) prompts_kernel(RankingLoss in, int width, int64_t prompts, Sums* sums) {
  __shared__ Sums between[kWarps];
  const int lane = threadIdx.x % width;
  const int64_t per_block = kThreads / width;
  Sums own;
  // All lanes of a warp go on until the last of its prompts is done: they exchange scores.
  for (int64_t first = blockIdx.x * per_block; first < prompts; first += gridDim.x * per_block) {
    const int64_t prompt = first + threadIdx.x / width;
    const Span span = prompt < prompts ? span_of(in.prompts, prompt) : Span{};
    const int64_t base = span.flat, length = span.length;
    // With boundaries a prompt has the whole warp; without them all prompts are of one length.
    const int64_t extent = in.prompts.boundaries ? length : in.prompts.length;
    double loss = 0, right = 0, pairs = 0;
    for (int64_t start = 0; start < extent; start += width) {
      const int64_t i = start + lane;
      const Entry mine = entry(in, base, i, length);
      Completion sum;
      for (int64_t other = 0; other < extent; other += width) {
        const Entry theirs = entry(in, base, other + lane, length);
        float differences = 0, product = 0;
        int short_pairs = 0;
        for (int k = 0; k < width; ++k) {
          const float score = shuffle(theirs.score, k, width);
          const int64_t rank = shuffle(theirs.rank, k, width);
          const bool exists = shuffle(static_cast<int>(theirs.exists), k, width);
          if (!exists || !mine.exists || rank == mine.rank) continue;
          const bool wins = mine.rank < rank;
          const float difference = wins ? mine.score - score : score - mine.score;
          const float x = difference - in.margin, tail = pair_tail(x), slope = pair_slope(x, tail);
          const float uphill = wins ? -slope : slope;
          const float term = uphill - sum.lost, next = sum.gradient + term;
          sum.lost = (next - sum.gradient) - term;
          sum.gradient = next;
          if (!wins) continue;
          if (!(x >= 0)) {  // NaN too
            differences += difference;
            ++short_pairs;
          }
          product = with_tail(product, tail);
          // Equal scores, and those that cannot be compared, count half.
          sum.right += difference > 0 ? 1.0f : difference < 0 ? 0.0f : 0.5f;
          sum.pairs += 1;
        }
        sum.loss += log1p(static_cast<double>(product)) - sum_below_zero<double>(differences, short_pairs, in.margin);
      }
      loss += sum.loss;
      right += sum.right;
      pairs += sum.pairs;
      if (in.gradient && i < length) in.gradient[base + i] = sum.gradient;
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      if (mask >= width) continue;
      loss += shuffle_xor(loss, mask);
      right += shuffle_xor(right, mask);
      pairs += shuffle_xor(pairs, mask);
    }
    const double share = inverse(fmax(pairs, 1.0));
    if (lane == 0 && pairs > 0) {
      own.loss += loss * share;
      own.right += right * share;
      own.prompts += 1;
    }
    if (in.gradient) {
      for (int64_t i = lane; i < length; i += width) in.gradient[base + i] = static_cast<float>(in.gradient[base + i] * share);
    }
  }
  own = block_merge(own, between, [](Sums& a, const Sums& b) { add(a, b); });
  if (threadIdx.x == 0) sums[blockIdx.x] = own;
}

// Every block adds up what the blocks of the first launch left, in one order.
__global__ void __launch_bounds__(kThreads) finish_kernel(RankingLoss in, int64_t blocks, const Sums* sums) {
  __shared__ Sums between[kWarps];
  __shared__ double share;
  Sums all;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) add(all, sums[i]);
  all = block_merge(all, between, [](Sums& a, const Sums& b) { add(a, b); });
  if (threadIdx.x == 0) {
    share = all.prompts ? 1.0 / static_cast<double>(all.prompts) : 0.0;
    if (blockIdx.x == 0) {
      *in.loss = static_cast<float>(all.loss * share);
      *in.accuracy = static_cast<float>(all.right * share);
    }
  }
  __syncthreads();
  if (!in.gradient) return;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kVector;
  for (int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector; at < in.completions; at += stride) {
    float x[kVector];
    fetch(in.gradient, at, in.completions - at).unpack(Dtype::float32, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = static_cast<float>(x[i] * share);
    store_vector(in.gradient, Dtype::float32, at, in.completions - at, x);
  }
}

// How many lanes a prompt gets, a power of two. Packed prompts, which may have any length, get a warp each.
int width_of(const Sequences& prompts) {
  int width = prompts.boundaries ? kWarp : 1;
  while (width < kWarp && width < prompts.length) width *= 2;
  return width;
}

int64_t blocks_of(int64_t prompts, int width) {
  const int64_t all = divide_up(prompts * width, kThreads);
  return all < kMostBlocks ? all : kMostBlocks;
}

}  // namespace

int64_t ranking_workspace(int64_t prompts) {
  return static_cast<int64_t>(sizeof(Sums)) * blocks_of(prompts, kWarp);
}

void ranking_loss(const RankingLoss& in, void* workspace, Stream stream) {
  auto* sums = static_cast<Sums*>(workspace);
  const int width = width_of(in.prompts);
  const int64_t blocks = blocks_of(in.prompts.count, width);
  launch(prompts_kernel, blocks, kThreads, stream, in, width, in.prompts.count, sums);
  const int64_t scaling = in.gradient ? divide_up(in.completions, kThreads * kVector) : 1;
  launch(finish_kernel, scaling < kMostBlocks ? scaling : kMostBlocks, kThreads, stream, in, blocks, sums);
}

}  // namespace rlhf_kernels::cuda
