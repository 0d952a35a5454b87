#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include "cpu/kernels.h"
#include "tensors.h"

namespace rlhf_kernels::cpu {

using tensors::ScalarType;
using tensors::Tensor;

// A mask as the kernels take it: a byte for every entry, which counts unless that is 0. Without a tensor every entry of `like`
// counts. The bytes of a mask that is not bool are made by `read`, part by part, in the threads that use them next: a pass of
// its own over the mask would take longer than a small op. `check` comes after all has been read.
class Mask {
 public:
  Mask(const char* name, const tensors::OptionalTensor& mask, const Tensor& like);

  const uint8_t* data() const { return static_cast<const uint8_t*>(bytes_.const_data_ptr()); }

  // Makes the bytes of entries [begin, end).
  void read(int64_t begin, int64_t end) const {
    if (unread_) make_bytes(begin, end);
  }

  // Of all sequences from `first` up to `last`.
  void read(const Sequences& sequences, int64_t first, int64_t last) const {
    if (!unread_) return;
    const auto start = [&](int64_t b) { return sequences.boundaries ? sequences.boundaries[b] : b * sequences.length; };
    make_bytes(start(first), start(last));
  }

  // Throws if an entry was neither 0 nor 1.
  void check() const {
    if (!is_mask_) refuse();
  }

  // All of it at once, where it is needed before there are threads.
  const Mask& read_and_check() const;

  // The same, without the entries whose index, dense and int64, is `ignored`.
  const Mask& read_and_check(const Tensor& index, std::optional<int64_t> ignored);

  // What reading so many entries takes, in units of `parallel`.
  int64_t work(int64_t entries) const { return std::max<int64_t>(1, unread_ ? entries * type_->size / 4 : entries / 8); }

 private:
  void make_bytes(int64_t begin, int64_t end) const;
  [[noreturn]] void refuse() const;

  const char* name_;
  Tensor mask_;  // its rows dense
  std::optional<MaskType> type_;  // none of a bool mask, whose bytes are there
  Tensor bytes_;
  mutable bool unread_;
  mutable std::atomic<bool> is_mask_ = true;
};

}  // namespace rlhf_kernels::cpu
