// Tokens drawn from rows of logits, with their log-probs: one read of a row, and a second look at the block that holds the
// token.

#include "rlhf_kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/denormals.h"
#include "cpu/softmax.h"
#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

namespace {

// What is kept of a block of the row: its sum, relative to the largest logit up to its end.
struct Block {
  double sum;
  float maximum;
};

// Relative to the row's maximum, what is 1 relative to a block's.
double factor_of(const Block& block, const OnlineSoftmax& row, double inverse_temperature) {
  const double shift = static_cast<double>(block.maximum) - row.maximum;
  return shift == 0 ? 1 : std::exp2(shift * inverse_temperature * kLog2E);
}

template <class T>
int64_t draw(const T* logits, int64_t vocabulary, std::vector<Block>& blocks, const OnlineSoftmax& row,
             double inverse_temperature, double random) {
  double total = 0;
  for (Block& block : blocks) {
    if (block.sum > 0) block.sum *= factor_of(block, row, inverse_temperature);
    total += block.sum;
  }
  const double target = random * total;
  double passed = 0;
  const int64_t at = part_at(target, passed, static_cast<int64_t>(blocks.size()), [&](int64_t i) { return blocks[i].sum; });
  const int64_t start = at * kBlock, count = std::min(kBlock, vocabulary - start);
  const double factor = factor_of(blocks[at], row, inverse_temperature);
  const Vec top(blocks[at].maximum), scale(static_cast<float>(inverse_temperature * kLog2E)), floor(kVanishing);
  float e[kBlock];
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec logit = load_lanes_or(logits + start + i, std::min(kLanes, count - i), -INFINITY);
    power_of_two(larger(floor, (logit - top) * scale)).store(e + i);
  }
  const int64_t lanes = kLanes * part_at(target, passed, divide_up(count, kLanes), [&](int64_t i) {
    return factor * sum(Vec::loadu(e + i * kLanes));
  });
  return start + lanes + part_at(target, passed, kLanes, [&](int64_t i) { return factor * double{e[lanes + i]}; });
}

// The first of the row's largest logits, which lies in the first block that knew of it.
template <class T>
int64_t first_largest(const T* logits, const std::vector<Block>& blocks, const OnlineSoftmax& row) {
  const auto block = std::find_if(blocks.begin(), blocks.end(), [&](const Block& b) { return b.maximum == row.maximum; });
  int64_t at = (block - blocks.begin()) * kBlock;
  while (static_cast<float>(logits[at]) != row.maximum) ++at;
  return at;
}

}  // namespace

void sample_tokens(const SamplingArguments& in, const SamplingResults& out, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const bool greedy = in.temperature == 0;
  const double inverse_temperature = greedy ? 1.0 : 1.0 / in.temperature;
  std::vector<Block> blocks(divide_up(in.vocabulary, kBlock));
  for_dtype(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      const T* logits = static_cast<const T*>(in.logits) + in.rows.offset(row);
      std::fill(blocks.begin(), blocks.end(), Block{0, -INFINITY});
      const OnlineSoftmax sums =
          reduce_row<T, false>(logits, in.vocabulary, inverse_temperature,
                               [&](int64_t start, float maximum, const BlockSums& block) {
                                 blocks[start / kBlock] = {sum(block.e), maximum};
                               });
      if (!std::isfinite(sums.sum) || sums.sum == 0) {
        out.tokens[row] = -1;
        out.logprobs[row] = NAN;
        continue;
      }
      const int64_t token = greedy ? first_largest(logits, blocks, sums)
                                   : draw(logits, in.vocabulary, blocks, sums, inverse_temperature,
                                          uniform(in.seed, in.streams.of(row), in.steps.of(row)));
      out.tokens[row] = token;
      out.logprobs[row] =
          static_cast<float>(rlhf_kernels::log_prob(sums, static_cast<float>(logits[token]), inverse_temperature));
    }
  });
}

int64_t lanes() { return kLanes; }

// Logits that lie column after column, as a matmul with the weights on the left leaves them, row after row. The squares
// [begin, end) of kLanes rows and as many tokens are numbered along the rows, so that a thread gets rows to itself: what it
// writes it mostly samples from next, and lines that cores hand to each other would be most of the time.
void logits_by_row(const float* columns, int64_t stride, int64_t rows, int64_t vocabulary, float* to, int64_t begin,
                   int64_t end) {
  const int64_t along = divide_up(vocabulary, kLanes);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t row = at / along * kLanes, token = at % along * kLanes;
    const int64_t count = std::min(kLanes, rows - row), tokens = std::min(kLanes, vocabulary - token);
    Vec square[kLanes];
    for (int64_t i = 0; i < tokens; ++i) square[i] = load_lanes(columns + (token + i) * stride + row, count);
    transpose(square, square);
    for (int64_t i = 0; i < count; ++i) store_lanes(to + (row + i) * vocabulary + token, square[i], tokens);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
