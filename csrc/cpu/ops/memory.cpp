#include "cpu/ops/memory.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rlhf_kernels::cpu {

using tensors::allocate;
using tensors::mutable_data;

void ensure_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t worth_it = int64_t{128} << 10;  // from here on malloc asks the system
  constexpr int populate_write = 23;                // MADV_POPULATE_WRITE, since Linux 5.14
  if (bytes < worth_it) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(start) / page * page;
  const int64_t pages = divide_up(reinterpret_cast<uintptr_t>(start) + bytes - first, page);
  // The last page but one tells whether this memory is new: the heap grows at its end, and the very last page may be shared
  // with a neighbour, and so be resident already.
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

}  // namespace rlhf_kernels::cpu
