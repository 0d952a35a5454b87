#include "cpu/ops/mask.h"

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "cpu/ops/memory.h"

namespace rlhf_kernels::cpu {

using namespace tensors;

Mask::Mask(const char* name, const OptionalTensor& mask, const Tensor& like)
    : name_(name),
      mask_(!mask ? empty({like.numel()}, ScalarType::Byte)
                  : mask->scalar_type() == ScalarType::Bool ? dense(*mask) : with_dense_rows(*mask)),
      bytes_(mask_),
      unread_(mask && mask->scalar_type() != ScalarType::Bool) {
  if (!mask) std::memset(mutable_data<uint8_t>(bytes_), 1, like.numel());
  if (!unread_) return;
  type_ = mask_type_of(mask->scalar_type());
  bytes_ = empty(sizes(*mask), ScalarType::Byte);
}

void Mask::make_bytes(int64_t begin, int64_t end) const {
  const auto* values = static_cast<const char*>(mask_.const_data_ptr());
  auto* bytes = mutable_data<uint8_t>(bytes_);
  const auto make = [&](int64_t from, int64_t to, int64_t count) {
    if (!kernels().read_mask(*type_, values + from * type_->size, count, bytes + to)) is_mask_ = false;
  };
  if (mask_.is_contiguous()) return make(begin, begin, end - begin);
  const auto rows = rows_of(mask_);
  const int64_t length = mask_.size(mask_.dim() - 1);
  for (int64_t at = begin, stop; at < end; at = stop) {
    const int64_t row = at / length, column = at % length;
    stop = std::min(end, (row + 1) * length);
    make(rows.offset(row) + column, at, stop - at);
  }
}

const Mask& Mask::read_and_check() const {
  if (unread_) parallel(mask_.numel(), work(1), [&](int64_t begin, int64_t end) { make_bytes(begin, end); });
  unread_ = false;
  check();
  return *this;
}

const Mask& Mask::read_and_check(const Tensor& index, std::optional<int64_t> ignored) {
  read_and_check();
  const auto* tokens = tensors::data<int64_t>(index);
  const int64_t count = index.numel();
  if (!ignored || std::find(tokens, tokens + count, *ignored) == tokens + count) return *this;
  const uint8_t* before = data();
  const Tensor rest = empty({count}, ScalarType::Byte);
  for (int64_t i = 0; i < count; ++i) mutable_data<uint8_t>(rest)[i] = before[i] && tokens[i] != *ignored;
  bytes_ = rest;
  return *this;
}

void Mask::refuse() const {
  if (type_->sign_bits) checks::refuse_mask<double>(name_, cast(mask_, ScalarType::Double));
  checks::refuse_mask<int64_t>(name_, cast(mask_, ScalarType::Long));
}

}  // namespace rlhf_kernels::cpu
