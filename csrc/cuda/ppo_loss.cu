// PPO's losses in two launches. The weights of a reduction need the whole mask, so the first launch counts it, reading one
// byte per position. The second reads the three inputs once, for loss, statistics and gradient; the last of its blocks to
// finish adds up the others' sums.

#include "cuda/device.h"
#include "rlhf_kernels/ppo_loss.h"

namespace rlhf_kernels::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = kThreads * kVector;

// How many positions the mask keeps, and how many rows have such a position. The first launch writes one per block, and
// the number of kept positions of each row.
struct Counts {
  int64_t positions = 0, rows = 0;
};

template <class Statistics>
struct Sums {
  double loss = 0;
  Statistics statistics;
};

// Room for either loss.
constexpr int64_t kSumsBytes = sizeof(Sums<PolicyStatistics<double>>);
static_assert(kSumsBytes >= sizeof(Sums<ValueStatistics<double>>));

struct Workspace {
  unsigned* ticket;
  Counts* counts;       // kMostBlocks
  int64_t* row_counts;  // where rows have weights of their own
  void* sums;           // Sums of each block of the second launch

  Workspace(void* memory, int64_t rows) {
    ticket = static_cast<unsigned*>(memory);
    counts = reinterpret_cast<Counts*>(static_cast<char*>(memory) + 16);
    row_counts = reinterpret_cast<int64_t*>(counts + kMostBlocks);
    sums = row_counts + rows;
  }
};

int64_t chunks_of(int64_t length) { return divide_up(length, kChunk); }

int64_t counting_blocks(const TokenLoss& in) {
  // A warp per row, or eight positions per thread.
  const int64_t all = in.reduction == Reduction::token_mean ? divide_up(in.rows * in.length, kChunk) : divide_up(in.rows, kWarps);
  return all < kMostBlocks ? all : kMostBlocks;
}

__global__ void __launch_bounds__(kThreads) count_kernel(Mask mask, int64_t rows, int64_t length, bool by_row,
                                                         unsigned* ticket, Counts* counts,
                                                         int64_t* row_counts) {
  __shared__ Counts between[kWarps];
  Counts own;
  if (by_row) {
    const unsigned lane = threadIdx.x % kWarp;
    for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; row < rows; row += int64_t{gridDim.x} * kWarps) {
      int64_t here = 0;
      for (int64_t t = int64_t{lane} * kVector; t < length; t += kWarp * kVector) {
        here += __popc(load_mask(mask, row * length + t, length - t));
      }
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) here += shuffle_xor(here, distance);
      if (lane == 0) {
        row_counts[row] = here;
        own.positions += here;
        own.rows += here > 0;
      }
    }
  } else {
    const int64_t size = rows * length, stride = int64_t{gridDim.x} * kChunk;
    for (int64_t at = int64_t{blockIdx.x} * kChunk + threadIdx.x * kVector; at < size; at += stride) {
      own.positions += __popc(load_mask(mask, at, size - at));
    }
  }
  own = block_merge(own, between, [](Counts& a, const Counts& b) {
    a.positions += b.positions;
    a.rows += b.rows;
  });
  if (threadIdx.x == 0) counts[blockIdx.x] = own;
  if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
}

// Each adds its loss at one position to a thread's sums, and returns the weighted gradient. At masked positions the inputs
// are 0.
struct Policy {
  using Statistics = PolicyStatistics<double>;
  PolicyClip clip;

  __device__ __forceinline__ float term(float logprob, float old, float advantage, bool counts, float weight,
                                        float weight_lost, Sums<Statistics>& sums) const {
    const float log_ratio = logprob - old;
    const auto ratio = policy_ratio(log_ratio);
    const auto term = policy_term(log_ratio, ratio.value, ratio.lost, advantage, clip, weight, weight_lost);
    const double exact = static_cast<double>(term.loss) + term.loss_lost;
    sums.loss += isfinite(term.loss) ? exact : static_cast<double>(term.loss);
    PolicyStatistics<float> here;
    here.ratio = counts ? ratio.value : 0.0f;
    here.deviation = ratio.deviation;
    here.kl = ratio.kl;
    here.clipped = term.clipped;
    sums.statistics.add(here);
    return term.gradient;
  }
};

struct Value {
  using Statistics = ValueStatistics<double>;
  float clip_range;

  __device__ __forceinline__ float term(float value, float old, float target, bool, float weight, float,
                                        Sums<Statistics>& sums) const {
    const auto term = value_term(value, old, target, clip_range);
    sums.loss += term.loss;
    sums.statistics.add(ValueStatistics<float>{value, target, term.clipped});
    return term.gradient * weight;
  }
};

// One block per chunk of a row.
template <class Loss>
__global__ void __launch_bounds__(kThreads) loss_kernel(TokenLoss in, Loss loss, Workspace workspace, unsigned per_row,
                                                        int64_t counters) {
  using LossSums = Sums<typename Loss::Statistics>;
  __shared__ Counts count_between[kWarps];
  __shared__ LossSums between[kWarps];
  auto* const of_blocks = static_cast<LossSums*>(workspace.sums);
  __shared__ double row_weight, position_share;
  const int64_t row = blockIdx.x / per_row, t = int64_t{blockIdx.x % per_row} * kChunk + threadIdx.x * kVector;
  Counts all;
  for (int64_t i = threadIdx.x; i < counters; i += kThreads) {
    all.positions += workspace.counts[i].positions;
    all.rows += workspace.counts[i].rows;
  }
  all = block_merge(all, count_between, [](Counts& a, const Counts& b) {
    a.positions += b.positions;
    a.rows += b.rows;
  });
  if (threadIdx.x == 0) {
    position_share = all.positions ? inverse(static_cast<double>(all.positions)) : 0;
    const int64_t number = in.reduction == Reduction::token_mean ? all.positions : all.rows;
    const double denominator = in.denominator > 0 ? in.denominator : static_cast<double>(number);
    row_weight = denominator > 0 ? inverse(denominator) : 0;
    if (in.reduction != Reduction::token_mean) {
      const int64_t own = workspace.row_counts[row];
      if (in.reduction == Reduction::seq_mean_token_mean && own) row_weight *= inverse(static_cast<double>(own));
    }
  }
  __syncthreads();
  const int64_t count = in.length - t, flat = row * in.length + t;
  LossSums sums;
  if (count > 0) {
    const unsigned counts = load_mask(in.mask, flat, count);
    Packed packed[3];
#pragma unroll
    for (int input = 0; input < 3; ++input) packed[input] = fetch(in.inputs[input], row, t, count);
    const float weight = static_cast<float>(row_weight), weight_lost = lost_by_conversion<float>(row_weight);
    float gradient[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool here = counts >> i & 1;
      float x[3];
#pragma unroll
      for (int input = 0; input < 3; ++input) x[input] = here ? packed[input].of(i, in.inputs[input].dtype) : 0.0f;
      gradient[i] = loss.term(x[0], x[1], x[2], here, weight, weight_lost, sums);
    }
    if (in.gradient) store_vector(in.gradient, Dtype::float32, flat, count, gradient);
  }
  const auto merge = [](LossSums& a, const LossSums& b) {
    a.loss += b.loss;
    a.statistics.add(b.statistics);
  };
  sums = block_merge(sums, between, merge);
  if (threadIdx.x == 0) {
    sums.loss *= row_weight;
    of_blocks[blockIdx.x] = sums;
  }
  if (!is_last_block(workspace.ticket, gridDim.x)) return;
  LossSums total;
  for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) merge(total, of_blocks[block]);
  total = block_merge(total, between, merge);
  if (threadIdx.x != 0) return;
  *in.loss = static_cast<float>(total.loss);
  total.statistics.store(in.statistics, position_share);
}

template <class Loss>
void run(const TokenLoss& in, const Loss& loss, void* memory, Stream stream) {
  const Workspace workspace(memory, in.rows);
  const int64_t counters = counting_blocks(in), per_row = chunks_of(in.length);
  launch(count_kernel, counters, kThreads, stream, in.mask, in.rows, in.length, in.reduction != Reduction::token_mean,
         workspace.ticket, workspace.counts, workspace.row_counts);
  launch(loss_kernel<Loss>, in.rows * per_row, kThreads, stream, in, loss, workspace, per_row, counters);
}

}  // namespace

int64_t token_loss_workspace(int64_t rows, int64_t length) {
  return 16 + static_cast<int64_t>(sizeof(Counts)) * kMostBlocks + 8 * rows +
         kSumsBytes * rows * chunks_of(length);
}

void ppo_policy_loss(const TokenLoss& in, const PolicyClip& clip, void* workspace, Stream stream) {
  run(in, Policy{clip}, workspace, stream);
}

void ppo_value_loss(const TokenLoss& in, float clip_range, void* workspace, Stream stream) {
  run(in, Value{clip_range}, workspace, stream);
}

}  // namespace rlhf_kernels::cuda
