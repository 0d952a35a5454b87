// What the CPU kernels take and do: plain functions on raw pointers, one build of them per instruction set.
// Nothing here knows of torch; csrc/cpu/ops checks, allocates and splits the work over threads.
#pragma once

#include <cstdint>

#include "rlhf_kernels/arguments.h"
#include "rlhf_kernels/online_softmax.h"
#include "rlhf_kernels/ppo_loss.h"

namespace rlhf_kernels::cpu {

// ------------------------------------------------------------------------------------------------ linear_log_prob

// hidden (rows, D) · weightᵀ (D, V): the operands of all matmuls of the family.
struct Projection {
  const void* hidden;
  int64_t hidden_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias;  // may be null
  Dtype dtype;
  Dtype gradients;     // of hidden and weight, as they are kept
  int64_t depth;       // D
  int64_t vocabulary;  // V
  double temperature;
  double softcap;  // 0: none
};

// What a row's loss needs besides its logits. The loss is weight·ℓ(log p); the weight comes from the reduction.
struct RowLoss {
  const int64_t* index;
  const double* weights;      // per row
  const float* advantages;    // null: cross-entropy, −w·log p
  const float* old_logprobs;  // null: those of the policy itself
  const float* ref_logprobs;  // null: no penalty
  PolicyOptions options;
  double entropy_coefficient;  // of the entropy that is taken off the loss
};

struct RowLossResults {
  double* loss;                               // per row, weighted
  LinearPolicyStatistics<float>* statistics;  // per row; null for cross-entropy
};

// -------------------------------------------------------------------------------------------------- small families

// A row's share of the loss, and its statistics summed over its unmasked positions.
struct PolicySums {
  double loss = 0;
  PolicyStatistics<double> statistics;
};
struct ValueSums {
  double loss = 0;
  ValueStatistics<double> statistics;
};

struct PolicyArguments {
  View logprobs, old_logprobs, advantages;
  View ref_logprobs;  // data null: no penalty
  const uint8_t* wanted;
  int64_t length;         // of a row; the last one ends where the positions do
  int64_t positions;
  const double* weights;  // per row
  PolicyOptions options;
  float* gradient;  // may be null
  PolicySums* sums;
};

struct ValueArguments {
  View values, old_values, returns;
  const uint8_t* wanted;
  int64_t length;
  int64_t positions;
  const double* weights;
  float clip_range;  // below 0: none
  float* gradient;
  ValueSums* sums;
};

struct RankingArguments {
  const void* scores;  // these three contiguous
  Dtype dtype;
  const int64_t* ranks;
  const uint8_t* wanted;  // null: all of them
  Sequences prompts;
  float margin;
  float* gradient;   // may be null; of the sum over prompts, divided by the number of all prompts
  double* losses;    // of a group of prompts, their sum
  double* accuracies;
  int64_t* counts;   // and how many of them have a pair
};

// All kernels of one instruction set. Ranges are of rows, blocks, sequences or groups of prompts.
struct Kernels {
  const char* isa;
  int64_t (*lanes)();  // floats in a vector, and prompts in a group of ranking

  // A byte per entry, 1 where the mask is 1; whether it is 0 everywhere else.
  bool (*read_mask)(const MaskType&, const void* mask, int64_t count, uint8_t* wanted);

  void (*log_prob)(const LogProbArguments&, const LogProbResults&, int64_t begin, int64_t end);
  void (*log_prob_backward)(const LogProbArguments&, const LogProbGradient&, int64_t begin, int64_t end);

  void (*logits_by_row)(const float* columns, int64_t stride, int64_t rows, int64_t vocabulary, float* to, int64_t begin,
                        int64_t end);
  void (*sample_tokens)(const SamplingArguments&, const SamplingResults&, int64_t begin, int64_t end);

  // wanted may be null: every position counts.
  void (*kl_penalty)(const View&, const View&, const uint8_t* wanted, int64_t length, KlEstimator, float* result,
                     int64_t begin, int64_t end);
  void (*kl_penalty_backward)(const View&, const View&, const uint8_t* wanted, int64_t length, KlEstimator,
                              const float* grad, float* result, int64_t begin, int64_t end);
  void (*kl_shaped_rewards)(const KlShaping&, const Sequences&, const uint8_t* wanted, int64_t begin, int64_t end);
  void (*gae)(const GaeArguments&, const KlShaping*, bool past_caches, int64_t begin, int64_t end);
  int64_t (*count_wanted)(const uint8_t* wanted, int64_t length);
  void (*whiten)(float* advantages, const uint8_t* wanted, double mean, double scale, int64_t begin, int64_t end);
  void (*ppo_policy)(const PolicyArguments&, int64_t begin, int64_t end);
  void (*ppo_value)(const ValueArguments&, int64_t begin, int64_t end);
  void (*ranking)(const RankingArguments&, int64_t begin, int64_t end);

  // pack_rows lays out rows of hidden as the left operand of the logits' matmul, in panels of tile_rows rows: the panel of row
  // r begins at packed_rows_size(r). pack_depth lays out columns of hidden as the right operand for the weight's gradient, in
  // depth_panels panels.
  int64_t (*tile_rows)(const Projection&);
  int64_t (*packed_rows_size)(const Projection&, int64_t rows);
  void (*pack_rows)(const Projection&, int64_t count, void* packed, int64_t begin, int64_t end);
  int64_t (*depth_panels)(const Projection&);
  int64_t (*packed_depth_size)(const Projection&, int64_t rows);
  void (*pack_depth)(const Projection&, int64_t count, void* packed, int64_t begin, int64_t end);
  int64_t (*vocabulary_blocks)(const Projection&);
  // Running sums of each (block of the vocabulary, row), `stride` rows to a block, without the logits.
  void (*linear_partials)(const Projection&, const void* packed, int64_t rows, const int64_t* index, bool with_entropy,
                          OnlineSoftmax* partials, int64_t stride, float* chosen, int64_t begin, int64_t end);
  // The logits themselves, softcap applied, (rows, V) float32.
  void (*linear_logits)(const Projection&, const void* packed, int64_t rows, float* logits, int64_t begin, int64_t end);
  // Logits to the loss and, over the logits, its gradient: float32, or bfloat16 where the matmul takes that.
  void (*linear_loss)(const Projection&, const RowLoss&, const RowLossResults&, float* logits, bool with_gradient,
                      int64_t begin, int64_t end);
  // The same from the sums that the forward kept, for a projection to a part of the vocabulary that begins at `first`.
  void (*linear_gradient)(const Projection&, const int64_t* index, int64_t first, const float* maxima,
                          const float* log_sums, const float* entropies, const float* grad_logprobs,
                          const float* grad_entropies, float* logits, int64_t begin, int64_t end);
  // slope_rows is the logits' gradient as linear_loss and linear_gradient leave it: in rows as long in bytes as those of the
  // logits. This makes sums (rows, D) = slope_rows · weight, or += if accumulate, for columns [begin, end) of D; store_rows then
  // rounds row i of the sums into row rows[i] of hidden's gradient.
  void (*linear_grad_hidden)(const Projection&, const float* slope_rows, int64_t rows, bool accumulate, float* sums,
                             int64_t begin, int64_t end);
  void (*store_rows)(const Projection&, const float* sums, const int64_t* rows, void* gradient, int64_t begin,
                     int64_t end);
  // The weight's gradient = slope_rowsᵀ · hidden, or += if accumulate. `packed` is hidden as pack_depth leaves it; blocks have
  // block_rows rows of the weight, a multiple of tile_rows.
  void (*linear_grad_weight)(const Projection&, const float* slope_rows, const void* packed, int64_t count, bool accumulate,
                             void* gradient, float* bias, int64_t block_rows, int64_t begin, int64_t end);
};

// Every kernel above by name and in this order, from which each instruction set declares and lists them. The matmuls are
// apart, since they alone differ between the instruction sets of bfloat16 and the one that these extend.
#define RLHF_SMALL_KERNELS(X) \
  X(lanes) X(read_mask) X(log_prob) X(log_prob_backward) X(logits_by_row) X(sample_tokens) X(kl_penalty) \
  X(kl_penalty_backward) X(kl_shaped_rewards) X(gae) X(count_wanted) X(whiten) X(ppo_policy) X(ppo_value) X(ranking)
#define RLHF_MATMULS(X) \
  X(tile_rows) X(packed_rows_size) X(pack_rows) X(depth_panels) X(packed_depth_size) X(pack_depth) \
  X(vocabulary_blocks) X(linear_partials) X(linear_logits) X(linear_loss) X(linear_gradient) X(linear_grad_hidden) \
  X(store_rows) X(linear_grad_weight)

// The best this processor runs, or the one that RLHF_KERNELS_ISA names.
const Kernels& kernels();

}  // namespace rlhf_kernels::cpu
