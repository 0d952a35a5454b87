// Every op for CPU tensors: the code that allocates results and splits the work over torch's threads.
// Arguments come checked from the Python functions of the same families, but for the values in tensors: checked here.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "schemas.h"
#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

using namespace rlhf_kernels::tensors;
using rlhf_kernels::Dtype;
using rlhf_kernels::GaeArguments;
using rlhf_kernels::KlShaping;
using rlhf_kernels::LogProbGradient;
using rlhf_kernels::LogProbResults;
using rlhf_kernels::Moments;
using rlhf_kernels::OnlineSoftmax;
using rlhf_kernels::PolicyClip;
using rlhf_kernels::Sequences;
using rlhf_kernels::View;
namespace checks = rlhf_kernels::checks;
namespace cpu = rlhf_kernels::cpu;

template <class Function>
void parallel(int64_t count, int64_t work_per_item, const Function& function) {
  constexpr int64_t worth_a_thread = 32768;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work_per_item)),
                              function);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that malloc has just got from the system has no pages yet. Asking for them by the run costs half of what one
// fault after another does, which is most of the time of an op that only writes. Where there are pages already, or
// another system, nothing happens.
void ensure_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t worth_it = int64_t{128} << 10;  // from here on malloc asks the system
  constexpr int populate_write = 23;                // MADV_POPULATE_WRITE, since Linux 5.14
  if (bytes < worth_it) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(start) / page * page;
  const int64_t pages = divide_up(reinterpret_cast<uintptr_t>(start) + bytes - first, page);
  // Memory grows at its end, and malloc_trim leaves the pages that neighbours share: the last but one tells.
  unsigned char resident;
  if (mincore(reinterpret_cast<void*>(first + (pages - 2) * page), page, &resident) != 0 || (resident & 1)) return;
  constexpr int64_t run = 64;
  torch::stable::parallel_for(0, divide_up(pages, run), 1, [&](int64_t begin, int64_t end) {
    const int64_t count = std::min(end * run, pages) - begin * run;
    // A system that can't leaves them to be faulted in.
    (void)madvise(reinterpret_cast<void*>(first + begin * run * page), count * page, populate_write);
  });
#endif
}

// For results that are written row by row, each after a call of ensure_pages: what was just cleared is in the cache then.
Tensor without_pages(const std::vector<int64_t>& shape, ScalarType type) {
  return allocate(shape, type, aoti_torch_device_type_cpu(), 0);
}

Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  Tensor result = without_pages(shape, type);
  // Below, what asking takes where there are pages is more than what it saves where there are none.
  constexpr int64_t worth_it = int64_t{1} << 20;
  const int64_t bytes = result.numel() * static_cast<int64_t>(result.element_size());
  if (bytes >= worth_it) ensure_pages(result.mutable_data_ptr(), bytes);
  return result;
}

Tensor zeros(const std::vector<int64_t>& shape, ScalarType type) {
  Tensor result = empty(shape, type);
  std::memset(result.mutable_data_ptr(), 0, result.numel() * result.element_size());
  return result;
}

Tensor nothing() { return without_pages({0}, ScalarType::Float); }

Tensor scalar(double value) {
  Tensor result = without_pages({}, ScalarType::Float);
  *mutable_data<float>(result) = static_cast<float>(value);
  return result;
}

cpu::MaskType mask_type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Char:
      return {1, 1, 0};
    case ScalarType::Short:
      return {2, 1, 0};
    case ScalarType::Int:
      return {4, 1, 0};
    case ScalarType::Long:
      return {8, 1, 0};
    case ScalarType::BFloat16:
      return {2, 0x3f80, 1};
    case ScalarType::Half:
      return {2, 0x3c00, 1};
    case ScalarType::Float:
      return {4, 0x3f800000, 1};
    case ScalarType::Double:
      return {8, 0x3ff0000000000000, 1};
    default:
      STD_TORCH_CHECK(false, "masks are bool, integers or floats");
  }
}

// A mask as the kernels read it: a byte for every entry, which counts unless that is 0.
class Mask {
 public:
  Mask(const char* name, const Tensor& mask)
      : bytes_(mask.scalar_type() == ScalarType::Bool ? dense(mask) : read(name, mask)) {}

  const uint8_t* data() const { return static_cast<const uint8_t*>(bytes_.const_data_ptr()); }

 private:
  // Rows of a slice where they lie.
  static Tensor read(const char* name, const Tensor& mask) {
    const auto type = mask_type_of(mask.scalar_type());
    const bool in_rows = !mask.is_contiguous() && mask.stride(mask.dim() - 1) == 1;
    const Tensor source = in_rows ? mask : dense(mask), bytes = empty(sizes(mask), ScalarType::Byte);
    const auto* values = static_cast<const char*>(source.const_data_ptr());
    auto* wanted = mutable_data<uint8_t>(bytes);
    std::atomic<bool> is_mask = true;
    const auto read_some = [&](int64_t from, int64_t to, int64_t count) {
      if (!cpu::kernels().read_mask(type, values + from * type.size, count, wanted + to)) is_mask = false;
    };
    if (in_rows) {
      const auto rows = rows_of(source);
      const int64_t length = mask.size(mask.dim() - 1);
      parallel(mask.numel() / length, length, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) read_some(rows.offset(row), row * length, length);
      });
    } else {
      parallel(mask.numel(), 1, [&](int64_t begin, int64_t end) { read_some(begin, begin, end - begin); });
    }
    if (is_mask) return bytes;
    if (type.sign_bits) checks::refuse_mask<double>(name, cast(mask, ScalarType::Double));
    checks::refuse_mask<int64_t>(name, cast(mask, ScalarType::Long));
  }

  Tensor bytes_;
};

// (B, T); or (N,), which boundaries of this name cut into sequences.
Sequences sequences_of(const Tensor& like, const char* name, const OptionalTensor& boundaries) {
  if (!boundaries) return {like.size(0), like.size(1), nullptr};
  const int64_t count = boundaries->size(0) - 1;
  checks::check_boundaries(name, data<int64_t>(boundaries), count, like.size(0));
  return {count, like.size(0), data<int64_t>(boundaries)};
}

// Of sequences that share a vector's lanes.
int64_t groups_of(const Sequences& sequences) {
  const int64_t width = cpu::kernels().sequences_per_group;
  return divide_up(sequences.count, width);
}

// ------------------------------------------------------------------------------------------------------- log_prob

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_log_softmax(Tensor logits, Tensor index, Tensor wanted,
                                                                 double temperature, bool with_entropy,
                                                                 bool /*inplace_backward: for autograd*/) {
  if (logits.stride(logits.dim() - 1) != 1) logits = torch::stable::contiguous(logits);
  const Tensor dense_index = cast(index, ScalarType::Long);
  const Mask mask("row_mask", wanted);
  const auto in = log_prob_arguments(logits, dense_index, mask.data(), temperature);
  checks::check_index("index", dense_index, mask.data(), in.vocabulary);
  const auto shape = sizes(index);
  Tensor logprobs = empty(shape, ScalarType::Float), maxima = empty(shape, ScalarType::Float),
         log_sums = empty(shape, ScalarType::Float), entropies = with_entropy ? empty(shape, ScalarType::Float) : nothing();
  const LogProbResults out{mutable_data<float>(logprobs), with_entropy ? mutable_data<float>(entropies) : nullptr,
                                mutable_data<float>(maxima), mutable_data<float>(log_sums)};
  parallel(index.numel(), in.vocabulary,
           [&](int64_t begin, int64_t end) { cpu::kernels().log_prob(in, out, begin, end); });
  return {logprobs, entropies, maxima, log_sums};
}

void log_prob_backward(const Tensor& logits, const Tensor& index, const Tensor& wanted, double temperature,
                       const Tensor& entropies, const Tensor& maxima, const Tensor& log_sums,
                       const Tensor& grad_logprobs, const OptionalTensor& grad_entropies, const Tensor& gradient) {
  const Tensor dense_index = cast(index, ScalarType::Long);
  const Mask mask("row_mask", wanted);
  const auto in = log_prob_arguments(logits, dense_index, mask.data(), temperature);
  checks::check_index("index", dense_index, mask.data(), in.vocabulary);
  const Tensor slopes = cast(grad_logprobs, ScalarType::Float);
  const OptionalTensor entropy_slopes = as_float(grad_entropies);
  const LogProbGradient out{data<float>(entropies), data<float>(maxima), data<float>(log_sums),
                                 data<float>(slopes), data<float>(entropy_slopes), gradient.mutable_data_ptr(),
                                 rows_of(gradient)};
  const bool in_place = gradient.const_data_ptr() == logits.const_data_ptr();
  const int64_t row_bytes = in.vocabulary * static_cast<int64_t>(gradient.element_size());
  parallel(index.numel(), in.vocabulary, [&](int64_t begin, int64_t end) {
    if (in_place) return cpu::kernels().log_prob_backward(in, out, begin, end);
    for (int64_t row = begin; row < end; ++row) {
      ensure_pages(mutable_data<char>(gradient) + row * row_bytes, row_bytes);
      cpu::kernels().log_prob_backward(in, out, row, row + 1);
    }
  });
}

Tensor selective_log_softmax_backward(Tensor logits, Tensor index, Tensor wanted, double temperature, Tensor entropies,
                                      Tensor maxima, Tensor log_sums, Tensor grad_logprobs,
                                      OptionalTensor grad_entropies) {
  if (logits.stride(logits.dim() - 1) != 1) logits = torch::stable::contiguous(logits);
  Tensor gradient = without_pages(sizes(logits), logits.scalar_type());
  log_prob_backward(logits, index, wanted, temperature, entropies, maxima, log_sums, grad_logprobs, grad_entropies,
                    gradient);
  return gradient;
}

void selective_log_softmax_backward_(Tensor logits, Tensor index, Tensor wanted, double temperature, Tensor entropies,
                                     Tensor maxima, Tensor log_sums, Tensor grad_logprobs,
                                     OptionalTensor grad_entropies) {
  if (logits.stride(logits.dim() - 1) != 1) {
    const Tensor gradient = selective_log_softmax_backward(logits, index, wanted, temperature, entropies, maxima,
                                                           log_sums, grad_logprobs, grad_entropies);
    torch::stable::copy_(logits, gradient);
    return;
  }
  log_prob_backward(logits, index, wanted, temperature, entropies, maxima, log_sums, grad_logprobs, grad_entropies,
                    logits);
}

// ------------------------------------------------------------------------------------------------ linear_log_prob

// What the logits of a chunk of rows may take; what those of a block of the vocabulary may, with the operands and sums
// that the backward of the log-probs keeps beside them, and the share of the latter.
constexpr int64_t kWorkspaceBytes = int64_t{112} << 20;
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
  cpu::Projection projection;

  LinearInputs(const Tensor& all_hidden, const Tensor& all_weight, const char* index_name, const Tensor& all_index,
               const Mask& mask, const OptionalTensor& all_bias, double temperature, std::optional<double> softcap)
      : hidden(all_hidden), weight(all_weight), bias(all_bias ? OptionalTensor(dense(*all_bias)) : std::nullopt) {
    STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type() &&
                        (!bias || bias->scalar_type() == weight.scalar_type()),
                    "hidden, weight and bias differ in dtype");
    const Tensor dense_index = cast(all_index, ScalarType::Long);
    checks::check_index(index_name, dense_index, mask.data(), weight.size(0));
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
                  bias ? bias->const_data_ptr() : nullptr, dtype_of(hidden), depth, weight.size(0), temperature, softcap.value_or(0.0)};
  }

  int64_t count() const { return static_cast<int64_t>(rows.size()); }

  // The rows from `first` on, and of the vocabulary the tokens from `token` on.
  cpu::Projection from(int64_t first) const { return from(first, 0, projection.vocabulary); }
  cpu::Projection from(int64_t first, int64_t token, int64_t tokens) const {
    cpu::Projection part = projection;
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
  const int64_t wanted = std::min(rows / fewest, divide_up(shares_per_thread * threads, blocks));
  const int64_t each = divide_up(divide_up(rows, wanted), multiple) * multiple, shares = divide_up(rows, each);
  torch::stable::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / shares, first = i % shares * each;
      task(first, std::min(rows, first + each), block, block + 1);
    }
  });
}

// Rows of hidden as the logits' matmul reads them.
Tensor packed_rows(const cpu::Projection& part, int64_t count) {
  const auto& k = cpu::kernels();
  const Tensor result = empty({k.packed_rows_size(part, count)}, ScalarType::Byte);
  torch::stable::parallel_for(0, divide_up(count, k.tile_rows(part)), 16, [&](int64_t begin, int64_t end) {
    k.pack_rows(part, count, result.mutable_data_ptr(), begin, end);
  });
  return result;
}

// The logits of these rows, into the workspace.
void make_logits(const cpu::Projection& part, const Tensor& operand, int64_t count, float* logits) {
  const auto& k = cpu::kernels();
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
    const auto make = [](const Tensor& like, bool every_row) {
      return every_row ? empty(sizes(like), like.scalar_type()) : zeros(sizes(like), like.scalar_type());
    };
    if (needs.hidden) hidden = make(like_hidden, in.count() == like_hidden.size(0));
    if (needs.weight) weight = make(like_weight, in.count() > 0);
    if (needs.weight && in.bias) bias_sums = zeros({like_weight.size(0)}, ScalarType::Float);
  }

  void begin_rows(int64_t first_row, int64_t rows) {
    const auto& k = cpu::kernels();
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

  // From the gradient of the logits of these rows and of the tokens that part.weight holds, the first of them `token`.
  void add(const cpu::Projection& part, int64_t token, const float* logits) {
    const auto& k = cpu::kernels();
    // A task reads its columns of every row of the weight: as wide as the threads allow. An entry's sum is the same.
    constexpr int64_t narrowest = 128, widest = 512;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t width = std::clamp(divide_up(part.depth, threads * narrowest) * narrowest, narrowest, widest);
    const int64_t tasks = needs.hidden ? divide_up(part.depth, width) : 0;
    share_out(count, 1, tasks, [&](int64_t row, int64_t last, int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        k.linear_grad_hidden(part, logits + row * part.vocabulary, last - row, token > 0,
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
      k.linear_grad_weight(part, logits, columns.const_data_ptr(), count, first > 0,
                           mutable_data<char>(weight) + token * part.depth * size_of(part.dtype),
                           in.bias ? mutable_data<float>(bias_sums) + token : nullptr, height, begin, end);
    });
  }

  void end_rows() {
    const auto part = in.from(first);
    parallel(needs.hidden ? count : 0, part.depth, [&](int64_t begin, int64_t end) {
      cpu::kernels().store_rows(part, data<float>(sums), in.rows.data() + first, hidden.mutable_data_ptr(), begin, end);
    });
  }

  std::tuple<Tensor, Tensor, Tensor> done() {
    if (needs.weight && in.bias) bias = cast(bias_sums, in.bias->scalar_type());
    return {hidden, weight, bias};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_selective_log_softmax(
    Tensor hidden, Tensor weight, Tensor index, Tensor wanted, OptionalTensor bias, double temperature,
    std::optional<double> softcap, bool with_entropy) {
  const auto& k = cpu::kernels();
  const LinearInputs in(hidden, weight, "index", index, Mask("row_mask", wanted), bias, temperature, softcap);
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
    Tensor hidden, Tensor weight, Tensor index, Tensor wanted, OptionalTensor bias, double temperature,
    std::optional<double> softcap, Tensor entropies, Tensor maxima, Tensor log_sums, Tensor grad_logprobs,
    OptionalTensor grad_entropies, bool needs_hidden, bool needs_weight) {
  const auto& k = cpu::kernels();
  const LinearInputs in(hidden, weight, "index", index, Mask("row_mask", wanted), bias, temperature, softcap);
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
      std::min(p.vocabulary, std::max<int64_t>(256, (kBackwardBytes - kOperandBytes) / (4 * std::max<int64_t>(1, rows)) / 256 * 256));
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
                                                                     const Tensor& weight, cpu::RowLoss loss,
                                                                     float* statistics, Needs needs) {
  const auto& k = cpu::kernels();
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
    cpu::RowLoss here = loss;
    here.index += first;
    here.weights += first;
    if (here.old_logprobs) here.old_logprobs += first;
    if (here.advantages) here.advantages += first;
    const cpu::RowLossResults out{losses.data() + first, statistics ? statistics + 5 * first : nullptr};
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
                                                                Tensor wanted, OptionalTensor bias, double temperature,
                                                                std::optional<double> softcap, bool mean,
                                                                bool needs_hidden, bool needs_weight) {
  const LinearInputs in(hidden, weight, "labels", labels, Mask("wanted", wanted), bias, temperature, softcap);
  const double scale = mean && in.count() ? 1.0 / static_cast<double>(in.count()) : 1.0;
  const std::vector<double> weights(in.count(), scale);
  const auto [loss, gradients] =
      linear_losses(in, hidden, weight, {in.index.data(), weights.data(), nullptr, nullptr, {}}, nullptr,
                    {needs_hidden, needs_weight});
  return {scalar(loss), std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)};
}

// ------------------------------------------------------------------------------------------------------- ppo_loss

// How a reduction weighs the positions of each row, from the mask alone.
struct Weights {
  std::vector<double> rows;
  int64_t positions = 0;

  Weights(const uint8_t* wanted, int64_t count, int64_t length, int64_t all, const std::string& reduction)
      : rows(count) {
    std::vector<int64_t> counts(count);
    parallel(count, length / 8, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t stop = std::min(length, all - row * length);
        counts[row] = cpu::kernels().count_wanted(wanted + row * length, stop);
      }
    });
    int64_t some = 0;
    for (const int64_t here : counts) {
      positions += here;
      some += here > 0;
    }
    for (int64_t row = 0; row < count; ++row) {
      if (reduction == "token-mean") {
        rows[row] = positions ? 1.0 / static_cast<double>(positions) : 0.0;
      } else {
        const double share = some ? 1.0 / static_cast<double>(some) : 0.0;
        rows[row] = reduction == "seq-mean-token-mean" && counts[row] ? share / static_cast<double>(counts[row]) : share;
      }
    }
  }
};

// A 1-D tensor is cut into rows of this length, so that its sums are made in one order on any number of threads.
constexpr int64_t kFlatRow = 4096;

struct TokenRows {
  int64_t count, length, positions;
  bool matrix;

  explicit TokenRows(const Tensor& tensor) : TokenRows(tensor, tensor.dim() == 2) {}

  // A row has its price: where rows mean nothing, and nothing lies between them, short ones are better forgotten.
  TokenRows(const Tensor& a, const Tensor& b, const Tensor& c, const std::string& reduction)
      : TokenRows(a, a.dim() == 2 && !(reduction == "token-mean" && a.is_contiguous() && b.is_contiguous() &&
                                       c.is_contiguous())) {}

  TokenRows(const Tensor& tensor, bool as_matrix) : matrix(as_matrix) {
    positions = tensor.numel();
    length = matrix ? tensor.size(1) : kFlatRow;
    count = matrix ? tensor.size(0) : divide_up(positions, kFlatRow);
  }

  View view(const Tensor& tensor) const {
    View result = view_of(tensor);
    if (!matrix && tensor.dim() == 2) result.stride = 1;  // where a dimension has one entry, its stride says nothing
    if (!matrix) result.row_stride = length * result.stride;
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> ppo_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                                                   Tensor wanted, double clip_low, double clip_high,
                                                   std::optional<double> dual_clip, std::string reduction,
                                                   bool with_gradient) {
  const Mask mask("mask", wanted);
  const TokenRows rows(logprobs, old_logprobs, advantages, reduction);
  const Weights weights(mask.data(), rows.count, rows.length, rows.positions, reduction);
  Tensor gradient = with_gradient ? empty(sizes(logprobs), ScalarType::Float) : nothing();
  std::vector<cpu::PolicySums> sums(rows.count);
  const cpu::PolicyArguments in{rows.view(logprobs), rows.view(old_logprobs), rows.view(advantages),
                                mask.data(), rows.length, rows.positions, weights.rows.data(),
                                policy_clip(clip_low, clip_high, dual_clip),
                                with_gradient ? mutable_data<float>(gradient) : nullptr, sums.data()};
  parallel(rows.count, rows.length * 4,
           [&](int64_t begin, int64_t end) { cpu::kernels().ppo_policy(in, begin, end); });
  cpu::PolicySums all{};
  for (const auto& row : sums) {
    all.loss += row.loss;
    all.ratio += row.ratio;
    all.deviation = row.deviation > all.deviation || row.deviation != row.deviation ? row.deviation : all.deviation;
    all.kl += row.kl;
    all.clipped += row.clipped;
  }
  const double share = weights.positions ? 1.0 / static_cast<double>(weights.positions) : 0.0;
  Tensor statistics = without_pages({4}, ScalarType::Float);
  const double values[] = {all.ratio * share, all.deviation, all.kl * share, all.clipped * share};
  for (int i = 0; i < 4; ++i) mutable_data<float>(statistics)[i] = static_cast<float>(values[i]);
  return {scalar(all.loss), statistics, gradient};
}

std::tuple<Tensor, Tensor, Tensor> ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor wanted,
                                                  std::optional<double> clip_range, std::string reduction,
                                                  bool with_gradient) {
  const Mask mask("mask", wanted);
  const TokenRows rows(values, old_values, returns, reduction);
  const Weights weights(mask.data(), rows.count, rows.length, rows.positions, reduction);
  Tensor gradient = with_gradient ? empty(sizes(values), ScalarType::Float) : nothing();
  std::vector<cpu::ValueSums> sums(rows.count);
  const cpu::ValueArguments in{rows.view(values), rows.view(old_values), rows.view(returns), mask.data(),
                               rows.length, rows.positions, weights.rows.data(),
                               clip_range ? static_cast<float>(*clip_range) : -1.0f,
                               with_gradient ? mutable_data<float>(gradient) : nullptr, sums.data()};
  parallel(rows.count, rows.length, [&](int64_t begin, int64_t end) { cpu::kernels().ppo_value(in, begin, end); });
  cpu::ValueSums all{};
  for (const auto& row : sums) {
    all.loss += row.loss;
    all.value += row.value;
    all.target += row.target;
    all.clipped += row.clipped;
  }
  const double share = weights.positions ? 1.0 / static_cast<double>(weights.positions) : 0.0;
  Tensor statistics = without_pages({3}, ScalarType::Float);
  const double shares[] = {all.value * share, all.target * share, all.clipped * share};
  for (int i = 0; i < 3; ++i) mutable_data<float>(statistics)[i] = static_cast<float>(shares[i]);
  return {scalar(all.loss), statistics, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_ppo_policy_loss(
    Tensor hidden, Tensor weight, Tensor index, Tensor old_logprobs, Tensor advantages, Tensor wanted,
    OptionalTensor bias, double temperature, std::optional<double> softcap, double clip_low, double clip_high,
    std::optional<double> dual_clip, std::string reduction, bool needs_hidden, bool needs_weight) {
  const Mask mask("mask", wanted);
  const LinearInputs in(hidden, weight, "index", index, mask, bias, temperature, softcap);
  const Tensor old = cast(old_logprobs, ScalarType::Float), gains = cast(advantages, ScalarType::Float);
  const int64_t length = wanted.dim() == 2 ? wanted.size(1) : std::max<int64_t>(1, wanted.numel());
  const int64_t count = wanted.dim() == 2 ? wanted.size(0) : 1;
  const Weights weights(mask.data(), count, length, wanted.numel(), reduction);
  std::vector<double> row_weights;
  std::vector<float> row_old, row_gains;
  for (const int64_t row : in.rows) {
    row_weights.push_back(weights.rows[row / length]);
    row_old.push_back(data<float>(old)[row]);
    row_gains.push_back(data<float>(gains)[row]);
  }
  std::vector<float> statistics(5 * in.count());
  const auto [loss, gradients] =
      linear_losses(in, hidden, weight,
                    {in.index.data(), row_weights.data(), row_old.data(), row_gains.data(),
                     policy_clip(clip_low, clip_high, dual_clip)},
                    statistics.data(), {needs_hidden, needs_weight});
  double all[5] = {};
  for (int64_t row = 0; row < in.count(); ++row) {
    for (int i = 0; i < 5; ++i) {
      const double value = statistics[5 * row + i];
      all[i] = i != 1 ? all[i] + value : value > all[i] || value != value ? value : all[i];
    }
  }
  const double share = in.count() ? 1.0 / static_cast<double>(in.count()) : 0.0;
  Tensor result = without_pages({5}, ScalarType::Float);
  for (int i = 0; i < 5; ++i) mutable_data<float>(result)[i] = static_cast<float>(i == 1 ? all[i] : all[i] * share);
  return {scalar(loss), result, std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)};
}

// ------------------------------------------------------------------------------------------------- kl_reward, gae

Tensor kl_penalty(Tensor logprobs, Tensor ref_logprobs, std::string estimator) {
  const TokenRows rows(logprobs);
  Tensor result = empty(sizes(logprobs), ScalarType::Float);
  const auto a = rows.view(logprobs), b = rows.view(ref_logprobs);
  // A flat tensor's last row may be short, which these kernels do not know: one row then.
  const int64_t count = logprobs.dim() == 2 ? rows.count : 1, length = logprobs.dim() == 2 ? rows.length : rows.positions;
  parallel(count, length, [&](int64_t begin, int64_t end) {
    cpu::kernels().kl_penalty(a, b, length, estimator_of(estimator), mutable_data<float>(result), begin, end);
  });
  return result;
}

Tensor kl_penalty_backward(Tensor logprobs, Tensor ref_logprobs, std::string estimator, Tensor gradient) {
  const TokenRows rows(logprobs);
  const Tensor slopes = cast(gradient, ScalarType::Float);
  Tensor result = empty(sizes(logprobs), ScalarType::Float);
  const auto a = rows.view(logprobs), b = rows.view(ref_logprobs);
  const int64_t count = logprobs.dim() == 2 ? rows.count : 1, length = logprobs.dim() == 2 ? rows.length : rows.positions;
  parallel(count, length, [&](int64_t begin, int64_t end) {
    cpu::kernels().kl_penalty_backward(a, b, length, estimator_of(estimator), data<float>(slopes),
                                       mutable_data<float>(result), begin, end);
  });
  return result;
}

std::tuple<Tensor, Tensor> kl_shaped_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor wanted,
                                             double beta, std::string estimator, std::optional<double> score_clip) {
  const Mask mask("mask", wanted);
  const Tensor row_scores = cast(scores, ScalarType::Float);
  Tensor rewards = empty(sizes(logprobs), ScalarType::Float), kl = empty(sizes(logprobs), ScalarType::Float);
  const auto shaping = shaping_of(row_scores, logprobs, ref_logprobs, beta, estimator, score_clip, rewards, kl);
  const Sequences sequences{logprobs.size(0), logprobs.size(1), nullptr};
  parallel(sequences.count, sequences.length, [&](int64_t begin, int64_t end) {
    cpu::kernels().kl_shaped_rewards(shaping, sequences, mask.data(), begin, end);
  });
  return {rewards, kl};
}

// GAE, with rewards shaped on the way if there is a shaping; then whitening over everything unmasked.
std::tuple<Tensor, Tensor> advantages_of(const Tensor& like, GaeArguments in, const KlShaping* shaping,
                                         bool whiten) {
  Tensor advantages = empty(sizes(like), ScalarType::Float), returns = empty(sizes(like), ScalarType::Float);
  in.advantages = mutable_data<float>(advantages);
  in.returns = mutable_data<float>(returns);
  std::vector<Moments> moments(whiten ? in.sequences.count : 0);
  in.moments = whiten ? moments.data() : nullptr;
  // By position: packed sequences are not of one length.
  const auto sequence_from = [&](int64_t position) {
    if (!in.sequences.boundaries) return divide_up(position, in.sequences.length);
    const int64_t* first = in.sequences.boundaries;
    return static_cast<int64_t>(std::lower_bound(first, first + in.sequences.count, position) - first);
  };
  // Whitening reads the advantages again at once.
  constexpr int64_t cached_bytes = int64_t{4} << 20;
  const bool past_caches = !whiten && like.numel() * static_cast<int64_t>(2 * sizeof(float)) > cached_bytes;
  parallel(like.numel(), 4, [&](int64_t begin, int64_t end) {
    cpu::kernels().gae(in, shaping, past_caches, sequence_from(begin), sequence_from(end));
  });
  if (whiten) {
    Moments all;
    for (const auto& sequence : moments) merge(all, sequence);
    constexpr double variance_floor = 1e-8;
    const double scale = all.count > 0 ? 1.0 / std::sqrt(all.squares / all.count + variance_floor) : 0.0;
    parallel(like.numel(), 1, [&](int64_t begin, int64_t end) {
      cpu::kernels().whiten(in.advantages, in.wanted, all.mean, scale, begin, end);
    });
  }
  return {advantages, returns};
}

std::tuple<Tensor, Tensor> masked_gae(Tensor rewards, Tensor values, Tensor wanted, double gamma, double lam,
                                      OptionalTensor bootstrap, bool whiten, OptionalTensor cu_seqlens) {
  const Mask mask("mask", wanted);
  const OptionalTensor last = as_float(bootstrap), boundaries = as_int64(cu_seqlens);
  return advantages_of(rewards,
                       {view_of(rewards), view_of(values), mask.data(),
                        sequences_of(rewards, "cu_seqlens", boundaries), gamma, lam, data<float>(last), nullptr, nullptr,
                        nullptr},
                       nullptr, whiten);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs,
                                                          Tensor values, Tensor wanted, double beta, double gamma,
                                                          double lam, bool whiten, OptionalTensor bootstrap,
                                                          std::string estimator, std::optional<double> score_clip,
                                                          OptionalTensor cu_seqlens) {
  const Mask mask("mask", wanted);
  const Tensor row_scores = cast(scores, ScalarType::Float);
  const OptionalTensor last = as_float(bootstrap), boundaries = as_int64(cu_seqlens);
  Tensor rewards = empty(sizes(logprobs), ScalarType::Float), kl = empty(sizes(logprobs), ScalarType::Float);
  const auto shaping = shaping_of(row_scores, logprobs, ref_logprobs, beta, estimator, score_clip, rewards, kl);
  const auto [advantages, returns] = advantages_of(
      logprobs,
      {{}, view_of(values), mask.data(), sequences_of(logprobs, "cu_seqlens", boundaries), gamma, lam,
       data<float>(last), nullptr, nullptr, nullptr},
      &shaping, whiten);
  return {advantages, returns, rewards, kl};
}

// --------------------------------------------------------------------------------------------------- ranking_loss

std::tuple<Tensor, Tensor, Tensor> pairwise_ranking_loss(Tensor scores, Tensor ranks, OptionalTensor offsets,
                                                         OptionalTensor wanted, double margin, bool with_gradient) {
  const auto& k = cpu::kernels();
  const Tensor values = dense(scores), dense_ranks = cast(ranks, ScalarType::Long);
  const auto mask = wanted ? std::make_optional<Mask>("mask", *wanted) : std::nullopt;
  const OptionalTensor boundaries = as_int64(offsets);
  const auto prompts = sequences_of(scores, "offsets", boundaries);
  Tensor gradient = with_gradient ? empty(sizes(scores), ScalarType::Float) : nothing();
  const int64_t groups = groups_of(prompts);
  std::vector<double> losses(groups), accuracies(groups);
  std::vector<int64_t> counts(groups);
  const cpu::RankingArguments in{values.const_data_ptr(), dtype_of(values), data<int64_t>(dense_ranks),
                                 mask ? mask->data() : nullptr, prompts, static_cast<float>(margin),
                                 with_gradient ? mutable_data<float>(gradient) : nullptr,
                                 losses.data(), accuracies.data(), counts.data()};
  const int64_t width = prompts.count ? scores.numel() / prompts.count : 0;
  parallel(groups, k.sequences_per_group * width * width * 4,
           [&](int64_t begin, int64_t end) { k.ranking(in, begin, end); });
  double loss = 0, accuracy = 0;
  int64_t some = 0;
  for (int64_t group = 0; group < groups; ++group) {
    loss += losses[group];
    accuracy += accuracies[group];
    some += counts[group];
  }
  const double share = some ? 1.0 / static_cast<double>(some) : 0.0;
  if (with_gradient && some && some < prompts.count) {
    float* slopes = mutable_data<float>(gradient);
    const double rest = static_cast<double>(prompts.count) * share;
    parallel(scores.numel(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) slopes[i] = static_cast<float>(slopes[i] * rest);
    });
  }
  return {scalar(loss * share), scalar(accuracy * share), gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY(rlhf_kernels, library) {
  rlhf_kernels::define_ops(library);
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, library) {
  library.impl("selective_log_softmax", TORCH_BOX(&selective_log_softmax));
  library.impl("selective_log_softmax_backward", TORCH_BOX(&selective_log_softmax_backward));
  library.impl("selective_log_softmax_backward_", TORCH_BOX(&selective_log_softmax_backward_));
  library.impl("linear_selective_log_softmax", TORCH_BOX(&linear_selective_log_softmax));
  library.impl("linear_selective_log_softmax_backward", TORCH_BOX(&linear_selective_log_softmax_backward));
  library.impl("linear_ppo_policy_loss", TORCH_BOX(&linear_ppo_policy_loss));
  library.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  library.impl("kl_penalty", TORCH_BOX(&kl_penalty));
  library.impl("kl_penalty_backward", TORCH_BOX(&kl_penalty_backward));
  library.impl("kl_shaped_rewards", TORCH_BOX(&kl_shaped_rewards));
  library.impl("masked_gae", TORCH_BOX(&masked_gae));
  library.impl("ppo_advantages", TORCH_BOX(&ppo_advantages));
  library.impl("ppo_policy_loss", TORCH_BOX(&ppo_policy_loss));
  library.impl("ppo_value_loss", TORCH_BOX(&ppo_value_loss));
  library.impl("pairwise_ranking_loss", TORCH_BOX(&pairwise_ranking_loss));
}

// The instruction set in use; or, after a "!", why there is none.
extern "C" __attribute__((visibility("default"))) const char* rlhf_kernels_isa() {
  static const std::string answer = [] {
    try {
      return std::string(cpu::kernels().isa);
    } catch (const std::exception& error) {
      return "!" + std::string(error.what());
    }
  }();
  return answer.c_str();
}
