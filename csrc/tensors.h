// From torch's tensors to what kernels are given (rlhf_kernels/arguments.h).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "rlhf_kernels/arguments.h"
#include "rlhf_kernels/ppo_loss.h"

namespace rlhf_kernels::tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, "the kernels take float32, bfloat16 and float16");
  }
}

inline MaskType mask_type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
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

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// As torch::stable::empty, which looks the operator up by its name every time: for a small op that is a third of its time.
inline Tensor allocate(const std::vector<int64_t>& shape, ScalarType type, int32_t device_type, int32_t device_index) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d] > 1 ? shape[d] : 1) strides[d] = stride;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

inline bool has_dense_rows(const Tensor& tensor) { return tensor.dim() == 0 || tensor.stride(tensor.dim() - 1) == 1; }

// Itself where only its rows lie apart, as those of a slice do.
inline Tensor with_dense_rows(const Tensor& tensor) {
  return has_dense_rows(tensor) ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}

// Of an int64 scalar that the host can read without waiting, as a number is handed over that all rows share.
inline std::optional<int64_t> number_of(const Tensor& tensor) {
  if (tensor.dim() != 0 || !tensor.is_cpu() || tensor.scalar_type() != ScalarType::Long) return std::nullopt;
  return *static_cast<const int64_t*>(tensor.const_data_ptr());
}

inline Tensor cast(const Tensor& tensor, ScalarType type) {
  return dense(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline std::vector<int64_t> sizes(const Tensor& tensor) {
  std::vector<int64_t> result(tensor.dim());
  for (int64_t d = 0; d < tensor.dim(); ++d) result[d] = tensor.size(d);
  return result;
}

// Of a tensor's first so many dimensions. Those that lie one in another are made one: a kernel divides for each that is left.
inline Rows rows_of(const Tensor& tensor, int64_t dims) {
  STD_TORCH_CHECK(dims <= kMaxDims, "the kernels take at most ", kMaxDims + 1, " dimensions");
  Rows rows{0, {}, {}};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    const int last = rows.dims - 1;
    if (last >= 0 && rows.strides[last] == size * stride) {
      rows.sizes[last] *= size;
      rows.strides[last] = stride;
    } else {
      rows.sizes[rows.dims] = size;
      rows.strides[rows.dims++] = stride;
    }
  }
  return rows;
}

inline Rows rows_of(const Tensor& tensor) { return rows_of(tensor, tensor.dim() - 1); }

// Where each entry of a tensor lies, in order.
inline Rows places_of(const Tensor& tensor) { return rows_of(tensor, tensor.dim()); }

inline View view_of(const Tensor& tensor) {
  const bool matrix = tensor.dim() == 2;
  return {tensor.const_data_ptr(), dtype_of(tensor), matrix ? tensor.stride(0) : 0, tensor.stride(matrix ? 1 : 0)};
}

// (B, T); or (N,), which boundaries cut into sequences, themselves unchecked.
inline Sequences sequences_of(const Tensor& like, const OptionalTensor& boundaries) {
  if (boundaries) return {boundaries->size(0) - 1, like.size(0), data<int64_t>(*boundaries)};
  return {like.size(0), like.size(1), nullptr};
}

inline OptionalTensor as_int64(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(cast(*tensor, ScalarType::Long)) : std::nullopt;
}

inline OptionalTensor as_float(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(cast(*tensor, ScalarType::Float)) : std::nullopt;
}

inline KlEstimator estimator_of(const std::string& name) {
  if (name == "k1") return KlEstimator::k1;
  if (name == "k2") return KlEstimator::k2;
  if (name == "k3") return KlEstimator::k3;
  return KlEstimator::abs;
}

// Of dense rows.
inline Logits logits_of(const Tensor& logits) {
  return {logits.const_data_ptr(), dtype_of(logits), rows_of(logits), logits.size(logits.dim() - 1)};
}

// index dense and int64.
inline LogProbArguments log_prob_arguments(const Tensor& logits, const Tensor& index, const uint8_t* wanted,
                                           double temperature) {
  return {logits_of(logits), data<int64_t>(index), wanted, temperature};
}

inline KlShaping shaping_of(const Tensor& scores, const Tensor& logprobs, const Tensor& ref_logprobs, double beta,
                            const std::string& estimator, std::optional<double> score_clip, const Tensor& rewards,
                            const Tensor& kl) {
  return {data<float>(scores), view_of(logprobs), view_of(ref_logprobs), beta, estimator_of(estimator),
          score_clip.value_or(-1.0), mutable_data<float>(rewards), mutable_data<float>(kl)};
}

}  // namespace rlhf_kernels::tensors
