// What kernels of every kind are given: plain structs of raw pointers, on the host or on a device.
#pragma once

#include <cstdint>

#include "rlhf_kernels/gae.h"
#include "rlhf_kernels/kl_reward.h"

namespace rlhf_kernels {

enum class Dtype { float32, bfloat16, float16 };

// How a dtype writes a mask's entries.
struct MaskType {
  int size;       // in bytes
  uint64_t one;   // the bits of 1
  int sign_bits;  // 1 for floats, else 0: an entry is 0 if nothing is left without them, so that −0 is 0
};

constexpr int kMaxDims = 8;

// Rows of a tensor of any leading shape; strides are in elements, the last dimension's is 1.
struct Rows {
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];

  RLHF_HOST_DEVICE int64_t offset(int64_t row) const {
    int64_t result = 0;
    for (int d = dims - 1; d > 0; --d) {
      result += (row % sizes[d]) * strides[d];
      row /= sizes[d];
    }
    return dims ? result + row * strides[0] : 0;
  }
};

// A matrix with any strides, read as float32.
struct View {
  const void* data;
  Dtype dtype;
  int64_t row_stride;
  int64_t stride;
};

// Sequences as the rows of padded matrices of `length` columns, or (boundaries not null) back to back in one row.
struct Sequences {
  int64_t count;
  int64_t length;
  const int64_t* boundaries;
};

// --------------------------------------------------------------------------------------------- log_prob, sampling

struct Logits {
  const void* logits;
  Dtype dtype;
  Rows rows;
  int64_t vocabulary;
};

struct LogProbArguments : Logits {
  const int64_t* index;
  const uint8_t* wanted;
  double temperature;
};

struct LogProbResults {
  float* logprobs;
  float* entropies;  // may be null
  float* maxima;
  float* log_sums;
};

struct LogProbGradient {
  const float* entropies;      // null with grad_entropies
  const float* maxima;
  const float* log_sums;
  const float* grad_logprobs;
  const float* grad_entropies;  // may be null
  void* gradient;               // may be the logits
  Rows rows;
};

// One for each row, or one for all.
struct Numbers {
  const int64_t* each;  // null: `all` is that of every row
  int64_t all;

  int64_t of(int64_t row) const { return each ? each[row] : all; }
};

struct SamplingArguments : Logits {
  Numbers streams, steps;
  uint64_t seed;
  double temperature;  // 0: the first largest
};

struct SamplingResults {
  int64_t* tokens;  // −1 where a row has NaN or inf, or nothing above −inf; its log-prob is NaN
  float* logprobs;
};

// -------------------------------------------------------------------------------------------------- kl_reward, gae

struct KlShaping {
  const float* scores;
  View logprobs;
  View ref_logprobs;
  double beta;
  KlEstimator estimator;
  double score_clip;  // below 0: none
  float* rewards;
  float* kl;
};

struct GaeArguments {
  View rewards;  // unused by ppo_advantages
  View values;
  const uint8_t* wanted;
  Sequences sequences;
  double gamma;
  double lambda;
  const float* bootstrap;  // may be null
  float* advantages;
  float* returns;
  Moments* moments;  // per sequence; may be null, without whitening
  bool unbiased;     // whitening by the unbiased variance
};

}  // namespace rlhf_kernels
