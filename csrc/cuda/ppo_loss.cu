// PPO's losses in two launches. The weights of a reduction need the whole mask, so the first launch counts it, reading one
// byte per position; where a row has one ratio, it also adds up the row's log-ratios. The second reads the inputs once,
// for loss, statistics and gradient; the last of its blocks to finish adds up the others' sums.

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
  int64_t* row_counts;  // where rows have weights or ratios of their own
  double* row_sums;     // of the log-ratios, where rows have ratios of their own
  void* sums;           // Sums of each block of the second launch

  Workspace(void* memory, int64_t rows) {
    ticket = static_cast<unsigned*>(memory);
    counts = reinterpret_cast<Counts*>(static_cast<char*>(memory) + 16);
    row_counts = reinterpret_cast<int64_t*>(counts + kMostBlocks);
    row_sums = reinterpret_cast<double*>(row_counts + rows);
    sums = row_sums + rows;
  }
};

int64_t chunks_of(int64_t length) { return divide_up(length, kChunk); }

int64_t counting_blocks(const TokenLoss& in, bool by_row) {
  // A warp per row, or eight positions per thread.
  const int64_t all = by_row ? divide_up(in.rows, kWarps) : divide_up(in.rows * in.length, kChunk);
  return all < kMostBlocks ? all : kMostBlocks;
}

// The sum of a warp's values, for every lane of it.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}

template <bool kRatios>
__global__ void __launch_bounds__(kThreads) count_kernel(TokenLoss in, bool by_row, Workspace to) {
  __shared__ Counts between[kWarps];
  const int64_t rows = in.rows, length = in.length;
  Counts own;
  if (by_row) {
    const unsigned lane = threadIdx.x % kWarp;
    for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; row < rows; row += int64_t{gridDim.x} * kWarps) {
      int64_t here = 0;
      double log_ratios = 0;
      for (int64_t t = int64_t{lane} * kVector; t < length; t += kWarp * kVector) {
        const unsigned counts = load_mask(in.mask, row * length + t, length - t);
        here += __popc(counts);
        if constexpr (kRatios) {
          const Packed logprobs = fetch(in.inputs[0], row, t, length - t), old = fetch(in.inputs[1], row, t, length - t);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const float log_ratio = logprobs.of(i, in.inputs[0].dtype) - old.of(i, in.inputs[1].dtype);
            log_ratios += counts >> i & 1 ? log_ratio : 0.0f;
          }
        }
      }
      here = warp_sum(here);
      if constexpr (kRatios) log_ratios = warp_sum(log_ratios);
      if (lane == 0) {
        to.row_counts[row] = here;
        if constexpr (kRatios) to.row_sums[row] = log_ratios;
        own.positions += here;
        own.rows += here > 0;
      }
    }
  } else {
    const int64_t size = rows * length, stride = int64_t{gridDim.x} * kChunk;
    for (int64_t at = int64_t{blockIdx.x} * kChunk + threadIdx.x * kVector; at < size; at += stride) {
      own.positions += __popc(load_mask(in.mask, at, size - at));
    }
  }
  own = block_merge(own, between, [](Counts& a, const Counts& b) {
    a.positions += b.positions;
    a.rows += b.rows;
  });
  if (threadIdx.x == 0) to.counts[blockIdx.x] = own;
  if (blockIdx.x == 0 && threadIdx.x == 0) *to.ticket = 0;
}

// What a position's share of the loss is, and the mean of its row's log-ratios.
struct Place {
  bool counts;
  float weight, weight_lost, log_ratio;
};

// Each adds its loss at one position, from the inputs x, to a thread's sums, and returns the weighted gradient. At masked
// positions the inputs are 0.
template <bool kReference>
struct Policy {
  using Statistics = PolicyStatistics<double>;
  static constexpr int kInputs = kReference ? 4 : 3;
  PolicyOptions options;

  __device__ __forceinline__ float term(const float* x, const Place& at, Sums<Statistics>& sums) const {
    const float logprob = x[0], advantage = x[2];
    const float log_ratio = options.by_sequence ? (at.counts ? at.log_ratio : 0.0f) : logprob - x[1];
    const auto ratio = policy_ratio(log_ratio, options);
    const auto term = policy_term(logprob, log_ratio, ratio.value, ratio.lost, advantage, options, at.weight, at.weight_lost);
    const double exact = static_cast<double>(term.loss) + term.loss_lost;
    sums.loss += isfinite(term.loss) ? exact : static_cast<double>(term.loss);
    auto here = statistics_of<PolicyStatistics<float>>(log_ratio, ratio, term);
    if (!at.counts) here.ratio = 0;  // a masked position's ratio is 1
    float gradient = term.gradient;
    if constexpr (kReference) {
      here.ref_kl = k3_penalty(logprob, x[3]);
      if (options.beta != 0) {
        sums.loss += options.beta * here.ref_kl;
        gradient = fmaf(k3_gradient(logprob, x[3]), static_cast<float>(options.beta) * at.weight, gradient);
      }
    }
    sums.statistics.add(here);
    return gradient;
  }
};

struct Value {
  using Statistics = ValueStatistics<double>;
  static constexpr int kInputs = 3;
  float clip_range;

  __device__ __forceinline__ float term(const float* x, const Place& at, Sums<Statistics>& sums) const {
    const auto term = value_term(x[0], x[1], x[2], clip_range);
    sums.loss += term.loss;
    sums.statistics.add(ValueStatistics<float>{x[0], x[2], term.clipped});
    return term.gradient * at.weight;
  }
};

// One block per chunk of a row.
template <class Loss>
__global__ void __launch_bounds__(kThreads) loss_kernel(TokenLoss in, Loss loss, Workspace workspace, unsigned per_row,
                                                        int64_t counters, bool by_sequence) {
  using LossSums = Sums<typename Loss::Statistics>;
  __shared__ Counts count_between[kWarps];
  __shared__ LossSums between[kWarps];
  auto* const of_blocks = static_cast<LossSums*>(workspace.sums);
  __shared__ double row_weight, position_share;
  __shared__ float row_log_ratio;
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
    if (in.reduction == Reduction::seq_mean_token_mean) {
      const int64_t own = workspace.row_counts[row];
      if (own) row_weight *= inverse(static_cast<double>(own));
    }
    if (by_sequence) {
      const int64_t own = workspace.row_counts[row];
      row_log_ratio = own ? static_cast<float>(workspace.row_sums[row] * inverse(static_cast<double>(own))) : 0.0f;
    }
  }
  __syncthreads();
  const int64_t count = in.length - t, flat = row * in.length + t;
  LossSums sums;
  if (count > 0) {
    const unsigned counts = load_mask(in.mask, flat, count);
    Packed packed[Loss::kInputs];
#pragma unroll
    for (int input = 0; input < Loss::kInputs; ++input) packed[input] = fetch(in.inputs[input], row, t, count);
    Place at{false, static_cast<float>(row_weight), lost_by_conversion<float>(row_weight), by_sequence ? row_log_ratio : 0.0f};
    float gradient[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      at.counts = counts >> i & 1;
      float x[Loss::kInputs];
#pragma unroll
      for (int input = 0; input < Loss::kInputs; ++input) {
        x[input] = at.counts ? packed[input].of(i, in.inputs[input].dtype) : 0.0f;
      }
      gradient[i] = loss.term(x, at, sums);
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
void run(const TokenLoss& in, const Loss& loss, bool by_sequence, void* memory, Stream stream) {
  const Workspace workspace(memory, in.rows);
  const bool by_row = by_sequence || in.reduction != Reduction::token_mean;
  const int64_t counters = counting_blocks(in, by_row), per_row = chunks_of(in.length);
  launch(by_sequence ? count_kernel<true> : count_kernel<false>, counters, kThreads, stream, in, by_row, workspace);
  launch(loss_kernel<Loss>, in.rows * per_row, kThreads, stream, in, loss, workspace, per_row, counters, by_sequence);
}

}  // namespace

int64_t token_loss_workspace(int64_t rows, int64_t length) {
  return 16 + static_cast<int64_t>(sizeof(Counts)) * kMostBlocks + 16 * rows +
         kSumsBytes * rows * chunks_of(length);
}

void ppo_policy_loss(const TokenLoss& in, const PolicyOptions& options, void* workspace, Stream stream) {
  if (in.inputs[3].data) {
    run(in, Policy<true>{options}, options.by_sequence, workspace, stream);
  } else {
    run(in, Policy<false>{options}, options.by_sequence, workspace, stream);
  }
}

void ppo_value_loss(const TokenLoss& in, float clip_range, void* workspace, Stream stream) {
  run(in, Value{clip_range}, false, workspace, stream);
}

}  // namespace rlhf_kernels::cuda
