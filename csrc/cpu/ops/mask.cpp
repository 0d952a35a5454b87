#include "cpu/ops/mask.h"

#include <atomic>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/ops/memory.h"

namespace rlhf_kernels::cpu {

using namespace tensors;

namespace {

MaskType mask_type_of(ScalarType type) {
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

}  // namespace

// Rows of a slice where they lie.
Tensor Mask::read(const char* name, const Tensor& mask) {
  const auto type = mask_type_of(mask.scalar_type());
  const bool in_rows = !mask.is_contiguous() && mask.stride(mask.dim() - 1) == 1;
  const Tensor source = in_rows ? mask : dense(mask), bytes = empty(sizes(mask), ScalarType::Byte);
  const auto* values = static_cast<const char*>(source.const_data_ptr());
  auto* wanted = mutable_data<uint8_t>(bytes);
  std::atomic<bool> is_mask = true;
  const auto read_some = [&](int64_t from, int64_t to, int64_t count) {
    if (!kernels().read_mask(type, values + from * type.size, count, wanted + to)) is_mask = false;
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

}  // namespace rlhf_kernels::cpu
