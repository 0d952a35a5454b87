// Masks of any dtype, read and counted.

#include "cpu/table.h"

namespace rlhf_kernels::cpu {
inline namespace RLHF_ISA {

namespace {

// By bits, which no dtype has to be converted for.
template <class Bits>
bool read(const Bits* values, Bits one, int sign_bits, int64_t count, uint8_t* wanted) {
  Bits others = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool is_one = values[i] == one;
    wanted[i] = is_one;
    others |= is_one ? Bits(0) : static_cast<Bits>(values[i] << sign_bits);
  }
  return others == 0;
}

}  // namespace

bool read_mask(const MaskType& type, const void* values, int64_t count, uint8_t* wanted) {
  const auto as = [&](auto bits) {
    using Bits = decltype(bits);
    return read(static_cast<const Bits*>(values), static_cast<Bits>(type.one), type.sign_bits, count, wanted);
  };
  switch (type.size) {
    case 1:
      return as(uint8_t{});
    case 2:
      return as(uint16_t{});
    case 4:
      return as(uint32_t{});
    default:
      return as(uint64_t{});
  }
}

int64_t count_wanted(const uint8_t* wanted, int64_t length) {
  int64_t total = 0;
  // Bytes are added as bytes, which a vector does 64 at a time, in runs too short to overflow.
  for (int64_t start = 0; start < length; start += 128) {
    const int64_t stop = start + 128 < length ? start + 128 : length;
    uint8_t some = 0;
    for (int64_t i = start; i < stop; ++i) some = static_cast<uint8_t>(some + (wanted[i] != 0));
    total += some;
  }
  return total;
}

}  // namespace RLHF_ISA
}  // namespace rlhf_kernels::cpu
