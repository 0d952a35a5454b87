// The output projection and what is made of its logits, block by block: log-probs without logits, losses with their
// gradient in place, and the two matmuls behind.

#include <cmath>
#include <memory>

#include "cpu/matmul.h"
#include "cpu/softmax.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {
namespace {

// Columns of logits that one task makes: a few tiles wide, so that packing pays; small enough for the L2 cache.
constexpr int64_t kVocabularyBlock = 8 * kTileColumns;
constexpr int64_t kRowGroup = 16 * kTileRows;
// Rows of the weight's gradient, and columns of hidden's, that one task makes.
constexpr int64_t kWeightBlock = 32 * kTileRows;
// Rows of it that are summed in float32 before they are added to a gradient in half precision.
constexpr int64_t kWeightStrip = 4 * kTileRows;
constexpr int64_t kDepthColumns = 8 * kTileColumns;
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

// The gradient of one row's log-prob and entropy, over its logits; bfloat16 where the matmuls behind take pairs.
template <class T>
void gradient_row(const Projection& p, float* logits, int64_t index, float maximum, float log_sum, float entropy,
                  float grad_logprob, float grad_entropy) {
  const float inverse_temperature = static_cast<float>(1.0 / p.temperature);
  const Vec top(maximum), scale(inverse_temperature), sums(log_sum), floor(kSmallestExponent);
  const Vec go(grad_logprob), gh(grad_entropy), h(entropy), one(1.0f);
  const Vec cap_inverse(p.softcap == 0 ? 0.0f : static_cast<float>(1 / p.softcap));
  T* gradient = reinterpret_cast<T*>(logits);
  const auto slope = [&](float logit) {  // of the softcap
    const double y = p.softcap == 0 ? 0 : logit / p.softcap;
    return 1 - y * y;
  };
  const float chosen = logits[index];
  // Sequential: an entry of the gradient never lies ahead of the logits still to be read.
  for (int64_t i = 0; i < p.vocabulary; i += kLanes) {
    const int64_t count = std::min(kLanes, p.vocabulary - i);
    const Vec logit = load_lanes(logits + i, count);
    const Vec log_p = larger(floor, (logit - top) * scale - sums);
    Vec g = logit_gradient(log_p, go, gh, h, scale);
    if (p.softcap != 0) {
      const Vec y = logit * cap_inverse;
      g = g * (one - y * y);
    }
    store_lanes(gradient + i, g, count);
  }
  const double log_p = (static_cast<double>(chosen) - maximum) / p.temperature - log_sum;
  const double probability = std::exp(log_p);
  const double from_entropy =
      grad_entropy == 0 || probability == 0 ? 0.0 : probability * grad_entropy * (log_p + entropy);
  gradient[index] = static_cast<T>(
      static_cast<float>((grad_logprob * (1 - probability) - from_entropy) / p.temperature * slope(chosen)));
}

void gradient_over_logits(const Projection& p, float* logits, int64_t index, float maximum, float log_sum,
                          float entropy, float grad_logprob, float grad_entropy) {
  if (in_pairs(p.dtype)) {
    gradient_row<c10::BFloat16>(p, logits, index, maximum, log_sum, entropy, grad_logprob, grad_entropy);
  } else {
    gradient_row<float>(p, logits, index, maximum, log_sum, entropy, grad_logprob, grad_entropy);
  }
}

}  // namespace

int64_t packed_size(const Projection& p, int64_t rows) {
  return divide_up(rows, kTileRows) * kTileRows * (in_pairs(p.dtype) ? divide_up(p.depth, 2) : p.depth) * 4;
}

int64_t row_panels(int64_t rows) { return divide_up(rows, kTileRows); }

void pack_rows(const Projection& p, int64_t count, void* packed, int64_t begin, int64_t end) {
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t first = begin * kTileRows;
    pack(math, static_cast<const T*>(p.hidden) + first * p.hidden_stride, p.hidden_stride, 1,
         std::min(count, end * kTileRows) - first, p.depth, kTileRows,
         static_cast<typename Math::Unit*>(packed) + first * units<Math>(p.depth));
  });
}

int64_t vocabulary_blocks(const Projection& p) { return divide_up(p.vocabulary, kVocabularyBlock); }

void linear_partials(const Projection& p, const void* packed, int64_t rows, const int64_t* index, bool with_entropy,
                     OnlineSoftmax* partials, float* chosen, int64_t begin, int64_t end) {
  const double inverse_temperature = 1.0 / p.temperature;
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using Unit = typename Math::Unit;
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t depth = units<Math>(p.depth);
    Array<Unit> weights(depth * kVocabularyBlock);
    Array<float> logits(std::min(kRowGroup, rows) * kVocabularyBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kVocabularyBlock, columns = std::min(kVocabularyBlock, p.vocabulary - first);
      pack(math, static_cast<const T*>(p.weight) + first * p.weight_stride, p.weight_stride, 1, columns, p.depth,
           kTileColumns, static_cast<Unit*>(weights));
      for (int64_t group = 0; group < rows; group += kRowGroup) {
        const int64_t count = std::min(kRowGroup, rows - group);
        multiply<Math>(static_cast<const Unit*>(packed) + group * depth, weights, logits, kVocabularyBlock, count,
                       columns, p.depth, false);
        finish_logits(p, logits, kVocabularyBlock, count, first, columns);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = group + i, at = index[row] - first;
          const float* line = logits + i * kVocabularyBlock;
          partials[block * rows + row] = with_entropy ? reduce_row<float, true>(line, columns, inverse_temperature)
                                                      : reduce_row<float, false>(line, columns, inverse_temperature);
          if (at >= 0 && at < columns) chosen[row] = line[at];
        }
      }
    }
  });
}

void linear_logits(const Projection& p, const void* packed, int64_t rows, float* logits, int64_t begin, int64_t end) {
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using Unit = typename Math::Unit;
    using T = std::remove_pointer_t<decltype(type)>;
    Array<Unit> weights(units<Math>(p.depth) * kVocabularyBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kVocabularyBlock, columns = std::min(kVocabularyBlock, p.vocabulary - first);
      pack(math, static_cast<const T*>(p.weight) + first * p.weight_stride, p.weight_stride, 1, columns, p.depth,
           kTileColumns, static_cast<Unit*>(weights));
      multiply<Math>(static_cast<const Unit*>(packed), weights, logits + first, p.vocabulary, rows, columns, p.depth,
                     false);
      finish_logits(p, logits + first, p.vocabulary, rows, first, columns);
    }
  });
}

void linear_loss(const Projection& p, const RowLoss& in, const RowLossResults& out, float* logits, bool with_gradient,
                 int64_t begin, int64_t end) {
  const double inverse_temperature = 1.0 / p.temperature;
  for (int64_t row = begin; row < end; ++row) {
    float* line = logits + row * p.vocabulary;
    const int64_t index = in.index[row];
    if (index < 0 || index >= p.vocabulary) {
      out.loss[row] = NAN;
      for (int k = 0; out.statistics && k < 5; ++k) out.statistics[row * 5 + k] = NAN;
      std::memset(line, 0, p.vocabulary * sizeof(float));
      continue;
    }
    const OnlineSoftmax sums = out.statistics ? reduce_row<float, true>(line, p.vocabulary, inverse_temperature)
                                              : reduce_row<float, false>(line, p.vocabulary, inverse_temperature);
    const double log_p = log_prob(sums, line[index], inverse_temperature);
    float coefficient = -in.weights[row], h = 0;
    if (out.statistics) {
      const auto term = policy_term(static_cast<float>(log_p), in.old_logprobs[row], in.advantages[row], in.clip);
      out.loss[row] = static_cast<double>(term.loss) * in.weights[row];
      coefficient = term.gradient * in.weights[row];
      h = static_cast<float>(entropy(sums));
      const float statistics[] = {term.ratio, term.deviation, term.kl, term.clipped, h};
      std::memcpy(out.statistics + row * 5, statistics, sizeof(statistics));
    } else {
      out.loss[row] = -log_p * in.weights[row];
    }
    if (!with_gradient) continue;
    gradient_over_logits(p, line, index, sums.maximum, static_cast<float>(std::log(sums.sum)), h, coefficient, 0);
  }
}

void linear_gradient(const Projection& p, const int64_t* index, const float* maxima, const float* log_sums,
                     const float* entropies, const float* grad_logprobs, const float* grad_entropies, float* logits,
                     int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const bool valid = index[row] >= 0 && index[row] < p.vocabulary;
    gradient_over_logits(p, logits + row * p.vocabulary, valid ? index[row] : 0, maxima[row], log_sums[row],
                         grad_entropies ? entropies[row] : 0, valid ? grad_logprobs[row] : 0,
                         grad_entropies ? grad_entropies[row] : 0);
  }
}

int64_t depth_blocks(const Projection& p) { return divide_up(p.depth, kDepthColumns); }

void linear_grad_hidden(const Projection& p, const float* logits, const int64_t* rows, int64_t count, void* gradient,
                        int64_t begin, int64_t end) {
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using Unit = typename Math::Unit;
    using T = std::remove_pointer_t<decltype(type)>;
    // The gradient of the logits as it lies there: pairs of bfloat16 in rows of the same length in bytes.
    using G = std::conditional_t<Math::kPerUnit == 2, T, float>;
    const G* slopes = reinterpret_cast<const G*>(logits);
    const int64_t slope_stride = p.vocabulary * static_cast<int64_t>(sizeof(float) / sizeof(G));
    const int64_t padded = divide_up(count, kTileRows) * kTileRows;
    Array<Unit> a(padded * units<Math>(kChunkOfVocabulary)), b(kDepthColumns * units<Math>(kChunkOfVocabulary));
    Array<float> sums(count * kDepthColumns);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kDepthColumns, columns = std::min(kDepthColumns, p.depth - first);
      for (int64_t v = 0; v < p.vocabulary; v += kChunkOfVocabulary) {
        const int64_t some = std::min(kChunkOfVocabulary, p.vocabulary - v);
        pack(math, slopes + v, slope_stride, 1, count, some, kTileRows, static_cast<Unit*>(a));
        pack(math, static_cast<const T*>(p.weight) + v * p.weight_stride + first, 1, p.weight_stride, columns, some,
             kTileColumns, static_cast<Unit*>(b));
        multiply<Math>(a, b, sums, kDepthColumns, count, columns, some, v > 0);
      }
      for (int64_t row = 0; row < count; ++row) {
        T* to = static_cast<T*>(gradient) + rows[row] * p.depth + first;
        for (int64_t i = 0; i < columns; i += kLanes) {
          const int64_t lanes = std::min(kLanes, columns - i);
          store_lanes(to + i, load_lanes(sums + row * kDepthColumns + i, lanes), lanes);
        }
      }
    }
  });
}

int64_t weight_blocks(const Projection& p) { return divide_up(p.vocabulary, kWeightBlock); }

void linear_grad_weight(const Projection& p, const float* logits, int64_t count, bool first_chunk, void* gradient,
                        float* bias, int64_t begin, int64_t end) {
  for_math(p.dtype, [&](auto math, auto* type) {
    using Math = decltype(math);
    using Unit = typename Math::Unit;
    using T = std::remove_pointer_t<decltype(type)>;
    using G = std::conditional_t<Math::kPerUnit == 2, T, float>;
    const G* slopes = reinterpret_cast<const G*>(logits);
    const int64_t slope_stride = p.vocabulary * static_cast<int64_t>(sizeof(float) / sizeof(G));
    const int64_t depth = units<Math>(count);
    const int64_t panels = divide_up(p.depth, kTileColumns);
    Array<Unit> a(kWeightBlock * depth), b(panels * kTileColumns * depth);
    Array<float> sums(std::is_same_v<T, float> ? 1 : kWeightStrip * panels * kTileColumns);
    if (begin < end) {
      pack(math, static_cast<const T*>(p.hidden), 1, p.hidden_stride, p.depth, count, kTileColumns,
           static_cast<Unit*>(b));
    }
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kWeightBlock, rows = std::min(kWeightBlock, p.vocabulary - first);
      pack(math, slopes + first, 1, slope_stride, rows, count, kTileRows, static_cast<Unit*>(a));
      T* to = static_cast<T*>(gradient) + first * p.depth;
      if constexpr (std::is_same_v<T, float>) {
        multiply<Math>(a, b, to, p.depth, rows, p.depth, count, !first_chunk);
      } else {
        const int64_t stride = panels * kTileColumns;
        for (int64_t i = 0; i < rows; i += kWeightStrip) {
          const int64_t some = std::min(kWeightStrip, rows - i);
          multiply<Math>(static_cast<Unit*>(a) + i * depth, b, sums, stride, some, p.depth, count, false);
          for (int64_t row = 0; row < some; ++row) {
            T* line = to + (i + row) * p.depth;
            for (int64_t d = 0; d < p.depth; d += kLanes) {
              const int64_t lanes = std::min(kLanes, p.depth - d);
              Vec value = load_lanes(sums + row * stride + d, lanes);
              if (!first_chunk) value = value + load_lanes(line + d, lanes);
              store_lanes(line + d, value, lanes);
            }
          }
        }
      }
      if (!bias) continue;
      for (int64_t i = 0; i < rows; ++i) {
        double total = first_chunk ? 0.0 : bias[first + i];
        for (int64_t r = 0; r < count; ++r) total += static_cast<float>(slopes[r * slope_stride + first + i]);
        bias[first + i] = static_cast<float>(total);
      }
    }
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
