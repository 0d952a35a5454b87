// What the CUDA kernels take and do: functions that launch on a stream and do not wait. Nothing here knows of torch;
// csrc/cuda/ops checks and allocates.
#pragma once

#include <cstdint>

#include "rlhf_kernels/arguments.h"
#include "rlhf_kernels/online_softmax.h"
#include "rlhf_kernels/ppo_loss.h"

namespace rlhf_kernels::cuda {

using Stream = void*;  // a cudaStream_t

// A dense mask of any dtype. An entry that is not 0 counts: nobody looks whether it is 1, which would wait for the GPU.
struct Mask {
  const void* data = nullptr;  // null: every entry counts
  int size = 1;                // of an entry, in bytes
  int sign_bits = 0;           // see MaskType
};

// CUDA's versions, 13000 for 13.0: the one that these kernels are built with, and the newest that the driver knows, 0 where
// there is none.
struct Versions {
  int built_with, driver;
};
Versions versions();
bool driver_is_too_old();

// --------------------------------------------------------------------------------------------- log_prob, sampling

// An int64 or int32 for every row.
struct Integers {
  const void* data;  // null: `all` is that of every row
  bool wide;         // int64
  Rows places;
  int64_t all;
};

// As LogProbArguments, of tensors as they come.
struct LogProbInputs : Logits {
  Integers index;
  Mask mask;
  Rows mask_places;
  bool ignores;  // the rows whose index is `ignored`
  int64_t ignored;
  double temperature;
};

void log_prob(const LogProbInputs&, const LogProbResults&, int64_t rows, Stream);
void log_prob_backward(const LogProbInputs&, const LogProbGradient&, int64_t rows, Stream);

struct SamplingInputs : Logits {
  Integers streams, steps;
  uint64_t seed;
  double temperature;  // 0: the first largest
};

// Bytes of the workspace for so many rows. It may hold anything before, but for the `launch` of this very call: a number that
// no other call in this process has.
int64_t sampling_workspace(int64_t rows, int64_t vocabulary);
void sample_tokens(const SamplingInputs&, const SamplingResults&, int64_t rows, void* workspace, uint64_t launch, Stream);

// ------------------------------------------------------------------------------------------------- kl_reward, gae

void kl_penalty(const View& logprobs, const View& ref_logprobs, const Mask&, int64_t rows, int64_t length, KlEstimator,
                float* result, Stream);
void kl_penalty_backward(const View& logprobs, const View& ref_logprobs, const Mask&, int64_t rows, int64_t length,
                         KlEstimator, const float* gradient, float* result, Stream);
void kl_shaped_rewards(const KlShaping&, const Sequences&, const Mask&, Stream);

// Whitens the advantages where in.moments is given. in.wanted is not read. size: the number of positions.
void gae(const GaeArguments& in, const Mask&, int64_t size, Stream);
// Makes the rewards itself: in.rewards is not read.
void ppo_advantages(const GaeArguments& in, const Mask&, const KlShaping&, int64_t size, Stream);

// ------------------------------------------------------------------------------------------------------- ppo_loss

enum class Reduction { token_mean, seq_mean_token_mean, seq_mean_token_sum };

// Inputs as rows of `length`. With token_mean the rows carry no meaning, and may be cut in any way.
struct TokenLoss {
  View inputs[4];  // the fourth is the reference policy's log-probs, whose data may be null
  Mask mask;
  int64_t rows;
  int64_t length;
  Reduction reduction;
  double denominator;  // in place of the number of positions or rows that count; 0: that number
  float* gradient;    // may be null
  float* loss;
  float* statistics;  // PolicyStatistics or ValueStatistics
};

// Bytes of the workspace that a loss needs for so many rows. It may hold anything before.
int64_t token_loss_workspace(int64_t rows, int64_t length);
void ppo_policy_loss(const TokenLoss&, const PolicyOptions&, void* workspace, Stream);
// clip_range below 0: none.
void ppo_value_loss(const TokenLoss&, float clip_range, void* workspace, Stream);

// --------------------------------------------------------------------------------------------------- ranking_loss

struct RankingLoss {
  const void* scores;
  Dtype dtype;
  const int64_t* ranks;
  Mask mask;
  Sequences prompts;
  int64_t completions;  // of all prompts
  float margin;
  float* gradient;  // may be null
  float* loss;
  float* accuracy;
};

int64_t ranking_workspace(int64_t prompts);
void ranking_loss(const RankingLoss&, void* workspace, Stream);

}  // namespace rlhf_kernels::cuda
