// Log-probs and losses from hidden states, for CPU tensors.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/ops/mask.h"
#include "cpu/ops/memory.h"
#include "cpu/ops/rows.h"
#include "tensors.h"

namespace rlhf_kernels::cpu::ops {
namespace {

using namespace tensors;

// In the losses: for the logits of a chunk of rows.
constexpr int64_t kWorkspaceBytes = int64_t{112} << 20;
// In the backward of the log-probs: for the logits of a block of the vocabulary, with packed operands and sums; and the share
// of the latter two.
constexpr int64_t kBackwardBytes = int64_t{88} << 20;
constexpr int64_t kOperandBytes = int64_t{24} << 20;
// Rows whose log-probs are made together: their packed form and running sums stay well under the workspace.
constexpr int64_t kForwardRows = 1536;

// The rows that count, side by side; where they all do, hidden itself.
struct LinearInputs {
  Tensor hidden, weight;
  OptionalTensor bias;
  std::vector<int64_t> rows;  // of the caller's, for each of ours
  std::vector<int64_t> index;
  Projection projection;

  LinearInputs(const Tensor& all_hidden, const Tensor& all_weight, const char* index_name, const Tensor& all_index,
               Mask& mask, std::optional<int64_t> ignore_index, const OptionalTensor& all_bias, double temperature,
               std::optional<double> softcap, int64_t least_index = 0)
      : hidden(all_hidden), weight(all_weight), bias(all_bias ? OptionalTensor(dense(*all_bias)) : std::nullopt) {
    STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type() &&
                        (!bias || bias->scalar_type() == weight.scalar_type()),
                    "hidden, weight and bias differ in dtype");
    const Tensor dense_index = cast(all_index, ScalarType::Long);
    mask.read_and_check(dense_index, ignore_index);
    checks::check_index(index_name, dense_index, mask.data(), weight.size(0), least_index);
    const int64_t count = all_index.numel(), depth = weight.size(1);
    for (int64_t row = 0; row < count; ++row) {
      if (!mask.data()[row]) continue;
      rows.push_back(row);
      index.push_back(data<int64_t>(dense_index)[row]);
    }
    if (depth > 0 && weight.stride(1) != 1) weight = torch::stable::contiguous(weight);
    if (hidden.stride(1) != 1) hidden = torch::stable::contiguous(hidden);
    if (static_cast<int64_t>(rows.size()) < count) {
      const Tensor some = empty({static_cast<int64_t>(rows.size()), depth}, hidden.scalar_type());
      const int64_t bytes = depth * static_cast<int64_t>(hidden.element_size());
      for (size_t i = 0; i < rows.size(); ++i) {
        std::memcpy(mutable_data<char>(some) + i * bytes,
                    data<char>(hidden) + rows[i] * hidden.stride(0) * hidden.element_size(), bytes);
      }
      hidden = some;
    }
    projection = {hidden.const_data_ptr(), hidden.stride(0), weight.const_data_ptr(), weight.stride(0),
                  bias ? bias->const_data_ptr() : nullptr, dtype_of(hidden), dtype_of(hidden), depth, weight.size(0),
                  temperature, softcap.value_or(0.0)};
  }

  // For a loss, whose gradients are made before the one that comes in is known. That may be a loss scale: of float16,
  // what is below 6e-8 would be lost to it.
  void keep_exact_gradients() {
    if (projection.dtype == Dtype::float16) projection.gradients = Dtype::float32;
  }

  ScalarType gradients_type() const {
    return projection.gradients == projection.dtype ? weight.scalar_type() : ScalarType::Float;
  }

  int64_t count() const { return static_cast<int64_t>(rows.size()); }

  // The rows from `first` on, and of the vocabulary the tokens from `token` on.
  Projection from(int64_t first) const { return from(first, 0, projection.vocabulary); }
  Projection from(int64_t first, int64_t token, int64_t tokens) const {
    Projection part = projection;
    const int64_t size = size_of(part.dtype);
    part.hidden = static_cast<const char*>(part.hidden) + first * part.hidden_stride * size;
    part.weight = static_cast<const char*>(part.weight) + token * part.weight_stride * size;
    if (part.bias) part.bias = static_cast<const char*>(part.bias) + token * size;
    part.vocabulary = tokens;
    return part;
  }
};

// Calls task(first row, last row, begin, end) for ranges of blocks. Where those are too few for the threads, as with a
// small vocabulary, each is made for some of the rows at a time. `multiple` rows belong together.
template <class Task>
void share_out(int64_t rows, int64_t multiple, int64_t blocks, const Task& task) {
  constexpr int64_t fewest = 192, shares_per_thread = 4;
  const int64_t threads = torch::stable::get_num_threads();
  if (blocks == 0 || rows == 0) return;
  if (blocks % threads == 0 || blocks >= shares_per_thread * threads || rows < 2 * fewest) {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { task(0, rows, begin, end); });
    return;
  }
  const int64_t most = std::min(rows / fewest, divide_up(shares_per_thread * threads, blocks));
  const int64_t each = divide_up(divide_up(rows, most), multiple) * multiple, shares = divide_up(rows, each);
  torch::stable::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / shares, first = i % shares * each;
      task(first, std::min(rows, first + each), block, block + 1);
    }
  });
}

// Rows of hidden as the logits' matmul reads them.
Tensor packed_rows(const Projection& part, int64_t count) {
  const auto& k = kernels();
  const Tensor result = empty({k.packed_rows_size(part, count)}, ScalarType::Byte);
  torch::stable::parallel_for(0, divide_up(count, k.tile_rows(part)), 16, [&](int64_t begin, int64_t end) {
    k.pack_rows(part, count, result.mutable_data_ptr(), begin, end);
  });
  return result;
}

// The logits of these rows, into the workspace.
void make_logits(const Projection& part, const Tensor& operand, int64_t count, float* logits) {
  const auto& k = kernels();
  share_out(count, k.tile_rows(part), k.vocabulary_blocks(part), [&](int64_t row, int64_t last, int64_t begin, int64_t end) {
    k.linear_logits(part, data<char>(operand) + k.packed_rows_size(part, row), last - row, logits + row * part.vocabulary,
                    begin, end);
  });
}

// Which gradients are wanted; the bias goes with the weight. A frozen output layer costs no matmul.
struct Needs {
  bool hidden, weight;
};

// The gradients of the three operands, from the logits' gradient: of some rows at a time, and of all or a part of the
// vocabulary.
struct LinearGradients {
  const LinearInputs& in;
  Tensor hidden, weight, bias, bias_sums;
  Needs needs;
  // Of the rows at hand: their columns packed, and hidden's gradient before it is rounded.
  Tensor columns, sums;
  int64_t first = 0, count = 0;

  LinearGradients(const LinearInputs& inputs, const Tensor& like_hidden, const Tensor& like_weight, Needs which)
      : in(inputs), hidden(nothing()), weight(nothing()), bias(nothing()), bias_sums(nothing()), needs(which),
        columns(nothing()), sums(nothing()) {
    // What no row reaches is 0.
    const auto make = [&](const Tensor& like, bool every_row) {
      return every_row ? empty(sizes(like), in.gradients_type()) : zeros(sizes(like), in.gradients_type());
    };
    if (needs.hidden) hidden = make(like_hidden, in.count() == like_hidden.size(0));
    if (needs.weight) weight = make(like_weight, in.count() > 0);
    if (needs.weight && in.bias) bias_sums = zeros({like_weight.size(0)}, ScalarType::Float);
  }

  void begin_rows(int64_t first_row, int64_t rows) {
    const auto& k = kernels();
    const auto part = in.from(first_row);
    first = first_row;
    count = rows;
    if (needs.hidden) sums = empty({count, part.depth}, ScalarType::Float);
    if (!needs.weight) return;
    columns = empty({k.packed_depth_size(part, count)}, ScalarType::Byte);
    torch::stable::parallel_for(0, k.depth_panels(part), 1, [&](int64_t begin, int64_t end) {
      k.pack_depth(part, count, columns.mutable_data_ptr(), begin, end);
    });
  }

  // Adds what slope_rows, the gradient of the logits, makes of these rows and of the tokens that part.weight holds, of which
  // `token` is the first.
  void add(const Projection& part, int64_t token, const float* slope_rows) {
    const auto& k = kernels();
    // A task reads its columns of every row of the weight: as wide as the threads allow. An entry's sum is the same.
    constexpr int64_t narrowest = 128, widest = 512;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t width = std::clamp(divide_up(part.depth, threads * narrowest) * narrowest, narrowest, widest);
    const int64_t tasks = needs.hidden ? divide_up(part.depth, width) : 0;
    share_out(count, 1, tasks, [&](int64_t row, int64_t last, int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        k.linear_grad_hidden(part, slope_rows + row * part.vocabulary, last - row, token > 0,
                             mutable_data<float>(sums) + row * part.depth, task * width,
                             std::min(part.depth, (task + 1) * width));
      }
    });
    if (!needs.weight) return;
    // As many rows of the weight's gradient to a task as the L2 cache has room for, and as many tasks to every thread.
    constexpr int64_t tallest = 192;
    const int64_t least = divide_up(divide_up(part.vocabulary, tallest), threads) * threads, tile = k.tile_rows(part);
    const int64_t height = divide_up(divide_up(part.vocabulary, least), tile) * tile;
    torch::stable::parallel_for(0, divide_up(part.vocabulary, height), 1, [&](int64_t begin, int64_t end) {
      k.linear_grad_weight(part, slope_rows, columns.const_data_ptr(), count, first > 0,
                           mutable_data<char>(weight) + token * part.depth * size_of(part.gradients),
                           in.bias ? mutable_data<float>(bias_sums) + token : nullptr, height, begin, end);
    });
  }

  void end_rows() {
    const auto part = in.from(first);
    parallel(needs.hidden ? count : 0, part.depth, [&](int64_t begin, int64_t end) {
      kernels().store_rows(part, data<float>(sums), in.rows.data() + first, hidden.mutable_data_ptr(), begin, end);
    });
  }

  std::tuple<Tensor, Tensor, Tensor> done() {
    if (needs.weight && in.bias) bias = cast(bias_sums, in.gradients_type());
    return {hidden, weight, bias};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_selective_log_softmax(
    Tensor hidden, Tensor weight, Tensor index, OptionalTensor mask, std::optional<int64_t> ignore_index,
    OptionalTensor bias, double temperature, std::optional<double> softcap, bool with_entropy) {
  const auto& k = kernels();
  Mask wanted("mask", mask, index);
  const LinearInputs in(hidden, weight, "index", index, wanted, ignore_index, bias, temperature, softcap);
  const std::vector<int64_t> shape{index.numel()};
  Tensor logprobs = zeros(shape, ScalarType::Float), maxima = zeros(shape, ScalarType::Float),
         log_sums = zeros(shape, ScalarType::Float), entropies = with_entropy ? zeros(shape, ScalarType::Float) : nothing();
  const int64_t blocks = k.vocabulary_blocks(in.projection);
  std::vector<OnlineSoftmax> partials(blocks * std::min(kForwardRows, in.count()));
  std::vector<float> chosen(std::min(kForwardRows, in.count()));
  for (int64_t first = 0; first < in.count(); first += kForwardRows) {
    const int64_t count = std::min(kForwardRows, in.count() - first);
    const auto part = in.from(first);
    const Tensor operand = packed_rows(part, count);
    share_out(count, k.tile_rows(part), blocks, [&](int64_t row, int64_t last, int64_t begin, int64_t end) {
      k.linear_partials(part, data<char>(operand) + k.packed_rows_size(part, row), last - row,
                        in.index.data() + first + row, with_entropy, partials.data() + row, count, chosen.data() + row,
                        begin, end);
    });
    parallel(count, blocks * 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        OnlineSoftmax all;
        for (int64_t b = 0; b < blocks; ++b) merge(all, partials[b * count + i], 1.0 / temperature);
        const int64_t row = in.rows[first + i];
        mutable_data<float>(logprobs)[row] = static_cast<float>(log_prob(all, chosen[i], 1.0 / temperature));
        if (with_entropy) mutable_data<float>(entropies)[row] = static_cast<float>(entropy(all));
        mutable_data<float>(maxima)[row] = all.maximum;
        mutable_data<float>(log_sums)[row] = static_cast<float>(std::log(all.sum));
      }
    });
  }
  return {logprobs, entropies, maxima, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> linear_selective_log_softmax_backward(
    Tensor hidden, Tensor weight, Tensor index, OptionalTensor mask, std::optional<int64_t> ignore_index,
    OptionalTensor bias, double temperature, std::optional<double> softcap, Tensor entropies, Tensor maxima,
    Tensor log_sums, Tensor grad_logprobs, OptionalTensor grad_entropies, bool needs_hidden, bool needs_weight) {
  const auto& k = kernels();
  Mask wanted("mask", mask, index);
  const LinearInputs in(hidden, weight, "index", index, wanted, ignore_index, bias, temperature, softcap, -1);
  const Tensor slopes = cast(grad_logprobs, ScalarType::Float);
  const OptionalTensor entropy_slopes = as_float(grad_entropies);
  std::vector<float> values[5];  // of the rows that count: maximum, log sum, entropy, both gradients
  const float* sources[] = {data<float>(maxima), data<float>(log_sums), data<float>(entropies), data<float>(slopes),
                            data<float>(entropy_slopes)};
  for (int i = 0; i < 5; ++i) {
    if (i == 2 && !grad_entropies) continue;
    for (const int64_t row : in.rows) values[i].push_back(sources[i] ? sources[i][row] : 0.0f);
  }
  // By blocks of the vocabulary, all rows at once: each entry of the weight's gradient is summed in float32 and rounded
  // once. The sums of the forward stand for the rest of the row.
  LinearGradients gradients(in, hidden, weight, {needs_hidden, needs_weight});
  const auto& p = in.projection;
  const int64_t rows = std::min(in.count(), std::max<int64_t>(384, kOperandBytes / (12 * std::max<int64_t>(1, p.depth))));
  const int64_t tokens =
      std::min(p.vocabulary,
               std::max<int64_t>(256, (kBackwardBytes - kOperandBytes) / (4 * std::max<int64_t>(1, rows)) / 256 * 256));
  const Tensor workspace = empty({rows * tokens}, ScalarType::Float);
  float* logits = mutable_data<float>(workspace);
  for (int64_t first = 0; first < in.count(); first += rows) {
    const int64_t count = std::min(rows, in.count() - first);
    const Tensor operand = packed_rows(in.from(first), count);
    gradients.begin_rows(first, count);
    for (int64_t token = 0; token < p.vocabulary; token += tokens) {
      const auto part = in.from(first, token, std::min(tokens, p.vocabulary - token));
      make_logits(part, operand, count, logits);
      parallel(count, part.vocabulary, [&](int64_t begin, int64_t end) {
        k.linear_gradient(part, in.index.data() + first, token, values[0].data() + first, values[1].data() + first,
                          grad_entropies ? values[2].data() + first : nullptr, values[3].data() + first,
                          grad_entropies ? values[4].data() + first : nullptr, logits, begin, end);
      });
      gradients.add(part, token, logits);
    }
    gradients.end_rows();
  }
  return gradients.done();
}

// Sums of the rows' losses, chunk by chunk, and the gradients of the operands if wanted. loss.weights etc. are per row
// that counts.
std::tuple<double, std::tuple<Tensor, Tensor, Tensor>> linear_losses(const LinearInputs& in, const Tensor& hidden,
                                                                     const Tensor& weight, RowLoss loss,
                                                                     LinearPolicyStatistics<float>* statistics,
                                                                     Needs needs) {
  const auto& k = kernels();
  const bool with_gradient = needs.hidden || needs.weight;
  LinearGradients gradients(in, hidden, weight, needs);
  // By rows, since a loss is known, and its gradient can begin, only when all logits of its row are.
  constexpr int64_t multiple = 4;  // of the rows that a tile takes, or near it
  const int64_t fitting = std::max<int64_t>(96, kWorkspaceBytes / (std::max<int64_t>(1, in.projection.vocabulary) * 4));
  const int64_t chunks = std::max<int64_t>(1, divide_up(in.count(), fitting));
  const int64_t rows = std::max<int64_t>(1, divide_up(divide_up(in.count(), chunks), multiple) * multiple);
  const Tensor workspace = empty({rows * in.projection.vocabulary}, ScalarType::Float);
  float* logits = mutable_data<float>(workspace);
  std::vector<double> losses(in.count());
  for (int64_t first = 0; first < in.count(); first += rows) {
    const int64_t count = std::min(rows, in.count() - first);
    const auto part = in.from(first);
    make_logits(part, packed_rows(part, count), count, logits);
    RowLoss here = loss;
    here.index += first;
    here.weights += first;
    for (const float** values : {&here.advantages, &here.old_logprobs, &here.ref_logprobs}) {
      if (*values) *values += first;
    }
    const RowLossResults out{losses.data() + first, statistics ? statistics + first : nullptr};
    parallel(count, part.vocabulary, [&](int64_t begin, int64_t end) {
      k.linear_loss(part, here, out, logits, with_gradient, begin, end);
    });
    if (!with_gradient) continue;
    gradients.begin_rows(first, count);
    gradients.add(part, 0, logits);
    gradients.end_rows();
  }
  double total = 0;
  for (const double row : losses) total += row;
  return {total, gradients.done()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels,
                                                                int64_t ignore_index, OptionalTensor bias,
                                                                double temperature,
                                                                std::optional<double> softcap, bool mean,
                                                                bool needs_hidden, bool needs_weight) {
  Mask all("labels", std::nullopt, labels);
  LinearInputs in(hidden, weight, "labels", labels, all, ignore_index, bias, temperature, softcap);
  in.keep_exact_gradients();
  const double scale = mean && in.count() ? 1.0 / static_cast<double>(in.count()) : 1.0;
  const std::vector<double> weights(in.count(), scale);
  const auto [loss, gradients] =
      linear_losses(in, hidden, weight, {in.index.data(), weights.data(), nullptr, nullptr, nullptr, {}, 0}, nullptr,
                    {needs_hidden, needs_weight});
  return {scalar(loss), std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_ppo_policy_loss(
    Tensor hidden, Tensor weight, Tensor index, OptionalTensor old_logprobs, Tensor advantages, OptionalTensor mask,
    OptionalTensor bias, double temperature, std::optional<double> softcap, OptionalTensor ref_logprobs, double beta,
    double clip_low, double clip_high, std::optional<double> dual_clip, std::optional<double> log_ratio_clamp,
    bool cispo, double entropy_coefficient, std::string reduction, std::optional<double> denominator,
    bool needs_hidden, bool needs_weight) {
  Mask wanted("mask", mask, index);
  LinearInputs in(hidden, weight, "index", index, wanted, std::nullopt, bias, temperature, softcap);
  in.keep_exact_gradients();
  const int64_t length = index.dim() == 2 ? index.size(1) : std::max<int64_t>(1, index.numel());
  const int64_t count = index.dim() == 2 ? index.size(0) : 1;
  const Weights weights(wanted, count, length, index.numel(), reduction, denominator);
  std::vector<double> row_weights;
  for (const int64_t row : in.rows) row_weights.push_back(weights.rows[row / length]);
  const auto of_rows = [&](const OptionalTensor& tensor) {
    std::vector<float> values;
    if (!tensor) return values;
    const Tensor dense = cast(*tensor, ScalarType::Float);
    for (const int64_t row : in.rows) values.push_back(data<float>(dense)[row]);
    return values;
  };
  const auto row_advantages = of_rows(advantages), row_old = of_rows(old_logprobs), row_ref = of_rows(ref_logprobs);
  std::vector<LinearPolicyStatistics<float>> statistics(in.count());
  const auto [loss, gradients] =
      linear_losses(in, hidden, weight,
                    {in.index.data(), row_weights.data(), row_advantages.data(), old_logprobs ? row_old.data() : nullptr,
                     ref_logprobs ? row_ref.data() : nullptr,
                     PolicyOptions::of(clip_low, clip_high, dual_clip, log_ratio_clamp, cispo, false, beta),
                     entropy_coefficient},
                    statistics.data(), {needs_hidden, needs_weight});
  LinearPolicyStatistics<double> all;
  for (const auto& row : statistics) all.add(row);
  Tensor result = without_pages({all.kCount}, ScalarType::Float);
  all.store(mutable_data<float>(result), in.count() ? 1.0 / static_cast<double>(in.count()) : 0.0);
  return {scalar(loss), result, std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, library) {
  library.impl("linear_selective_log_softmax", TORCH_BOX(&linear_selective_log_softmax));
  library.impl("linear_selective_log_softmax_backward", TORCH_BOX(&linear_selective_log_softmax_backward));
  library.impl("linear_ppo_policy_loss", TORCH_BOX(&linear_ppo_policy_loss));
  library.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
}

}  // namespace rlhf_kernels::cpu::ops
