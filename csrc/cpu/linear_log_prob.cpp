// The output projection and what is made of its logits, block by block: log-probs without logits, losses with their
// gradient in place, and the two matmuls behind.

#include <cmath>
#include <memory>

#include "cpu/denormals.h"
#include "cpu/matmul.h"
#include "cpu/softmax.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {
namespace {

// Columns of logits that one task makes: a few tiles wide, so that packing pays; small enough for the L2 cache.
constexpr int64_t kVocabularyBlock = 8 * kTileColumns;
// Rows that are worked on together, so that their operand and their part of the result stay in the L2 cache.
template <class Math>
constexpr int64_t kRowGroup = 192 / Math::kTileRows * Math::kTileRows;
// Columns of the weight's gradient that are summed over all of k in memory of their own. In the gradient itself the rows
// of a tile lie as far apart as the rows of the weight: often a power of two, of which a cache keeps only a few.
constexpr int64_t kWeightColumns = 128 / kTileColumns * kTileColumns;
// How much of the vocabulary a task of hidden's gradient packs at a time.
constexpr int64_t kChunkOfVocabulary = 2 * kDepthBlock;

template <class T>
struct Array {
  explicit Array(int64_t size) : values(new T[size]) {}
  operator T*() { return values.get(); }
  std::unique_ptr<T[]> values;
};

bool in_pairs([[maybe_unused]] Dtype dtype) {
#if defined(__AVX512BF16__)
  return dtype == Dtype::bfloat16;
#else
  return false;
#endif
}

// Calls function(math, null pointer of the operands' type).
template <class Function>
void for_math(Dtype dtype, Function&& function) {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::bfloat16) return function(BfloatPairs{}, static_cast<c10::BFloat16*>(nullptr));
#endif
  for_dtype(dtype, [&](auto* type) { function(Floats{}, type); });
}

// Bias and softcap, over columns [first, first + columns) of rows of logits.
void finish_logits(const Projection& p, float* logits, int64_t stride, int64_t rows, int64_t first, int64_t columns) {
  if (!p.bias && p.softcap == 0) return;
  const Vec cap(static_cast<float>(p.softcap)), zero(0.0f);
  for_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* bias = p.bias ? static_cast<const T*>(p.bias) + first : nullptr;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < columns; i += kLanes) {
        const int64_t count = std::min(kLanes, columns - i);
        float* at = logits + row * stride + i;
        Vec values = load_lanes(at, count) + (bias ? load_lanes(bias + i, count) : zero);
        if (p.softcap != 0) values = cap * (values / cap).tanh();
        store_lanes(at, values, count);
      }
    }
  });
}

// Replaces one row's logits, or a block of them, by the gradient of its log-prob and entropy. The block need not hold the
// chosen logit. Where the matmuls that follow take bfloat16, so is the gradient: it is narrower than the logits, so it never
// overwrites one that is still to be read.
template <class T>
void gradient_in_place(const Projection& p, float* logits, int64_t index, float maximum, float log_sum, float entropy,
                       float grad_logprob, float grad_entropy) {
  const double inverse_temperature = 1 / p.temperature;
  const LogitGradient<Vec> slopes(maximum, log_sum, entropy, grad_logprob, grad_entropy, inverse_temperature);
  T* gradient = reinterpret_cast<T*>(logits);
  const bool here = index >= 0 && index < p.vocabulary;
  const float chosen = here ? logits[index] : 0.0f;
  if (p.softcap != 0) {
    const Vec one(1.0f), cap_inverse(static_cast<float>(1 / p.softcap));
    for (int64_t i = 0; i < p.vocabulary; i += kLanes) {
      const int64_t count = std::min(kLanes, p.vocabulary - i);
      const Vec logit = load_lanes(logits + i, count), y = logit * cap_inverse;
      store_lanes(gradient + i, slopes.of<true>(logit) * (one - y * y), count);
    }
  } else if (grad_entropy != 0) {
    gradient_row<true>(slopes, logits, p.vocabulary, gradient);
  } else {
    gradient_row<false>(slopes, logits, p.vocabulary, gradient);
  }
  if (!here) return;
  const double y = p.softcap == 0 ? 0 : chosen / p.softcap;
  gradient[index] = static_cast<T>(static_cast<float>(
      chosen_logit_gradient(chosen, maximum, log_sum, entropy, grad_logprob, grad_entropy, inverse_temperature) *
      (1 - y * y)));
}

void gradient_over_logits(const Projection& p, float* logits, int64_t index, float maximum, float log_sum,
                          float entropy, float grad_logprob, float grad_entropy) {
  if (in_pairs(p.dtype)) {
    gradient_in_place<c10::BFloat16>(p, logits, index, maximum, log_sum, entropy, grad_logprob, grad_entropy);
  } else {
    gradient_in_place<float>(p, logits, index, maximum, log_sum, entropy, grad_logprob, grad_entropy);
  }
}

// Stores a block of sums, or adds it to what is there.
template <class T>
void store_block(const float* sums, int64_t rows, int64_t columns, T* to, int64_t stride, bool accumulate) {
  for (int64_t row = 0; row < rows; ++row) {
    T* line = to + row * stride;
    if (accumulate) __builtin_prefetch(line + 4 * stride, 1);
    for (int64_t i = 0; i < columns; i += kLanes) {
      const int64_t lanes = std::min(kLanes, columns - i);
      Vec value = load_lanes(sums + row * kWeightColumns + i, lanes);
      if (accumulate) value = value + load_lanes(line + i, lanes);
      store_lanes(line + i, value, lanes);
    }
  }
}

}  // namespace

int64_t tile_rows(const Projection& p) {
  int64_t rows = 0;
  for_math(p.dtype, [&](auto math, auto*) { rows = decltype(math)::kTileRows; });
  return rows;
}

int64_t packed_rows_size(const Projection& p, int64_t rows) {
  int64_t bytes = 0;
  for_math(p.dtype, [&](auto math, auto*) {
    using Math = decltype(math);
    bytes = padded_rows<Math>(rows) * units<Math>(p.depth) * static_cast<int64_t>(sizeof(typename Math::Unit));
  });
  return bytes;
}

void pack_rows(const Projection& p, int64_t count, void* packed, int64_t begin, int64_t end) {
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t first = begin * Math::kTileRows;
    pack_left(math, static_cast<const T*>(p.hidden) + first * p.hidden_stride, p.hidden_stride, 1,
              std::min(count, end * Math::kTileRows) - first, p.depth,
              static_cast<typename Math::Unit*>(packed) + first * units<Math>(p.depth));
  });
}

int64_t depth_panels(const Projection& p) { return divide_up(p.depth, kTileColumns); }

int64_t packed_depth_size(const Projection& p, int64_t rows) {
  int64_t bytes = 0;
  for_math(p.dtype, [&](auto math, auto*) {
    using Math = decltype(math);
    bytes = padded_columns(p.depth) * units<Math>(rows) * static_cast<int64_t>(sizeof(typename Math::Unit));
  });
  return bytes;
}

void pack_depth(const Projection& p, int64_t count, void* packed, int64_t begin, int64_t end) {
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t first = begin * kTileColumns;
    pack_right(math, static_cast<const T*>(p.hidden) + first, 1, p.hidden_stride,
               std::min(p.depth, end * kTileColumns) - first, count,
               static_cast<typename Math::Unit*>(packed) + first * units<Math>(count));
  });
}

int64_t vocabulary_blocks(const Projection& p) { return divide_up(p.vocabulary, kVocabularyBlock); }

void linear_partials(const Projection& p, const void* packed, int64_t rows, const int64_t* index, bool with_entropy,
                     OnlineSoftmax* partials, int64_t stride, float* chosen, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const double inverse_temperature = 1.0 / p.temperature;
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using Unit = typename Math::Unit;
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t depth = units<Math>(p.depth);
    Array<Unit> weights(depth * kVocabularyBlock);
    Array<float> logits(std::min(kRowGroup<Math>, rows) * kVocabularyBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kVocabularyBlock, columns = std::min(kVocabularyBlock, p.vocabulary - first);
      pack_right(math, static_cast<const T*>(p.weight) + first * p.weight_stride, p.weight_stride, 1, columns, p.depth,
                 static_cast<Unit*>(weights));
      for (int64_t group = 0; group < rows; group += kRowGroup<Math>) {
        const int64_t count = std::min(kRowGroup<Math>, rows - group);
        multiply<Math>(static_cast<const Unit*>(packed) + group * depth, weights, logits, kVocabularyBlock, count,
                       columns, p.depth, false);
        finish_logits(p, logits, kVocabularyBlock, count, first, columns);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = group + i, at = index[row] - first;
          const float* line = logits + i * kVocabularyBlock;
          partials[block * stride + row] = with_entropy ? reduce_row<float, true>(line, columns, inverse_temperature)
                                                        : reduce_row<float, false>(line, columns, inverse_temperature);
          if (at >= 0 && at < columns) chosen[row] = line[at];
        }
      }
    }
  });
}

void linear_logits(const Projection& p, const void* packed, int64_t rows, float* logits, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using Unit = typename Math::Unit;
    using T = std::remove_pointer_t<decltype(type)>;
    Array<Unit> weights(units<Math>(p.depth) * kVocabularyBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kVocabularyBlock, columns = std::min(kVocabularyBlock, p.vocabulary - first);
      pack_right(math, static_cast<const T*>(p.weight) + first * p.weight_stride, p.weight_stride, 1, columns, p.depth,
                 static_cast<Unit*>(weights));
      for (int64_t row = 0; row < rows; row += kRowGroup<Math>) {
        multiply<Math>(static_cast<const Unit*>(packed) + row * units<Math>(p.depth), weights,
                       logits + row * p.vocabulary + first, p.vocabulary, std::min(kRowGroup<Math>, rows - row), columns,
                       p.depth, false);
      }
      finish_logits(p, logits + first, p.vocabulary, rows, first, columns);
    }
  });
}

void linear_loss(const Projection& p, const RowLoss& in, const RowLossResults& out, float* logits, bool with_gradient,
                 int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const double inverse_temperature = 1.0 / p.temperature;
  for (int64_t row = begin; row < end; ++row) {
    float* line = logits + row * p.vocabulary;
    const int64_t index = in.index[row];
    const OnlineSoftmax sums = out.statistics ? reduce_row<float, true>(line, p.vocabulary, inverse_temperature)
                                              : reduce_row<float, false>(line, p.vocabulary, inverse_temperature);
    const double log_p = log_prob(sums, line[index], inverse_temperature);
    const double weight = in.weights[row];
    float coefficient = static_cast<float>(-weight), of_entropy = 0, h = 0;
    if (out.statistics) {
      const double log_ratio = log_p - (in.old_logprobs ? in.old_logprobs[row] : log_p);
      const auto ratio = policy_ratio(log_ratio, in.options);
      const auto term = policy_term<double>(log_p, log_ratio, ratio.value, ratio.lost, in.advantages[row], in.options,
                                            weight, 0);
      double loss = term.loss, gradient = term.gradient;
      auto& statistics = out.statistics[row];
      statistics = statistics_of<LinearPolicyStatistics<float>>(log_ratio, ratio, term);
      if (in.ref_logprobs) {
        const double reference = in.ref_logprobs[row], kl = k3_penalty(log_p, reference);
        statistics.ref_kl = static_cast<float>(kl);
        if (in.options.beta != 0) {
          loss += in.options.beta * kl;
          gradient += in.options.beta * k3_gradient(log_p, reference) * weight;
        }
      }
      h = static_cast<float>(entropy(sums));
      if (in.entropy_coefficient != 0) {
        loss -= in.entropy_coefficient * entropy(sums);
        of_entropy = static_cast<float>(-in.entropy_coefficient * weight);
      }
      out.loss[row] = loss * weight;
      coefficient = static_cast<float>(gradient);
      statistics.entropy = h;
    } else {
      out.loss[row] = -log_p * weight;
    }
    if (!with_gradient) continue;
    gradient_over_logits(p, line, index, sums.maximum, static_cast<float>(std::log(sums.sum)), h, coefficient,
                         of_entropy);
  }
}

void linear_gradient(const Projection& p, const int64_t* index, int64_t first, const float* maxima,
                     const float* log_sums, const float* entropies, const float* grad_logprobs,
                     const float* grad_entropies, float* logits, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  for (int64_t row = begin; row < end; ++row) {
    gradient_over_logits(p, logits + row * p.vocabulary, index[row] - first, maxima[row], log_sums[row],
                         grad_entropies ? entropies[row] : 0, grad_logprobs[row],
                         grad_entropies ? grad_entropies[row] : 0);
  }
}

void linear_grad_hidden(const Projection& p, const float* slope_rows, int64_t rows, bool accumulate, float* sums,
                        int64_t begin, int64_t end) {
  const FlushDenormals flush;
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using Unit = typename Math::Unit;
    using T = std::remove_pointer_t<decltype(type)>;
    // The gradient of the logits as it lies there: pairs of bfloat16 in rows of the same length in bytes.
    using G = std::conditional_t<Math::kPerUnit == 2, T, float>;
    const G* slopes = reinterpret_cast<const G*>(slope_rows);
    const int64_t slope_stride = p.vocabulary * static_cast<int64_t>(sizeof(float) / sizeof(G));
    const int64_t group = std::min(kRowGroup<Math>, rows), columns = end - begin;
    Array<Unit> a(padded_rows<Math>(group) * units<Math>(kChunkOfVocabulary));
    Array<Unit> b(padded_columns(columns) * units<Math>(kChunkOfVocabulary));
    for (int64_t v = 0; v < p.vocabulary; v += kChunkOfVocabulary) {
      const int64_t some = std::min(kChunkOfVocabulary, p.vocabulary - v);
      pack_right(math, static_cast<const T*>(p.weight) + v * p.weight_stride + begin, 1, p.weight_stride, columns, some,
                 static_cast<Unit*>(b));
      for (int64_t row = 0; row < rows; row += group) {
        const int64_t count = std::min(group, rows - row);
        pack_left(math, slopes + row * slope_stride + v, slope_stride, 1, count, some, static_cast<Unit*>(a));
        multiply<Math>(a, b, sums + row * p.depth + begin, p.depth, count, columns, some, accumulate || v > 0);
      }
    }
  });
}

void store_rows(const Projection& p, const float* sums, const int64_t* rows, void* to, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  for_dtype(p.gradients, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      T* line = static_cast<T*>(to) + rows[row] * p.depth;
      for (int64_t i = 0; i < p.depth; i += kLanes) {
        const int64_t lanes = std::min(kLanes, p.depth - i);
        store_lanes(line + i, load_lanes(sums + row * p.depth + i, lanes), lanes);
      }
    }
  });
}

void linear_grad_weight(const Projection& p, const float* slope_rows, const void* packed, int64_t count, bool accumulate,
                        void* gradient, float* bias, int64_t block_rows, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using Unit = typename Math::Unit;
    using T = std::remove_pointer_t<decltype(type)>;
    using G = std::conditional_t<Math::kPerUnit == 2, T, float>;
    const G* slopes = reinterpret_cast<const G*>(slope_rows);
    const int64_t slope_stride = p.vocabulary * static_cast<int64_t>(sizeof(float) / sizeof(G));
    const int64_t depth = units<Math>(count);
    const auto* b = static_cast<const Unit*>(packed);
    Array<Unit> a(block_rows * depth);
    Array<float> sums(block_rows * kWeightColumns);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_rows, rows = std::min(block_rows, p.vocabulary - first);
      pack_left(math, slopes + first, 1, slope_stride, rows, count, static_cast<Unit*>(a));
      for (int64_t column = 0; column < p.depth; column += kWeightColumns) {
        const int64_t columns = std::min(kWeightColumns, p.depth - column);
        multiply<Math>(a, b + column * depth, sums, kWeightColumns, rows, columns, count, false);
        for_dtype(p.gradients, [&](auto* kept) {
          store_block(sums, rows, columns, static_cast<decltype(kept)>(gradient) + first * p.depth + column, p.depth,
                      accumulate);
        });
      }
      if (!bias) continue;
      for (int64_t i = 0; i < rows; ++i) {
        double total = accumulate ? bias[first + i] : 0.0;
        for (int64_t r = 0; r < count; ++r) total += static_cast<float>(slopes[r * slope_stride + first + i]);
        bias[first + i] = static_cast<float>(total);
      }
    }
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
