// The Python module `_C`: how this library was built, and host-side work that needs nothing of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "msvc " + std::to_string(_MSC_VER);
#endif
  info["standard"] = "C++" + std::to_string(__cplusplus / 100 % 100);
  info["build"] = RLHF_KERNELS_BUILD_TYPE;
  info["version"] = RLHF_KERNELS_VERSION;
  return info;
}

// Best-fit-decreasing bin packing in O(n log n). Ties go to the lower index and to the row opened first.
std::vector<std::vector<std::int64_t>> pack_sequences(const std::vector<std::int64_t>& lengths, std::int64_t capacity) {
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 1 || lengths[i] > capacity) {
      throw std::invalid_argument("lengths: is " + std::to_string(lengths[i]) + " at index " + std::to_string(i) +
                                  ", must be in [1, " + std::to_string(capacity) + "], the capacity");
    }
  }
  std::vector<std::int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return lengths[a] > lengths[b]; });

  std::vector<std::vector<std::int64_t>> rows;
  std::set<std::pair<std::int64_t, std::size_t>> room;  // (tokens left, row)
  for (const auto index : order) {
    const auto length = lengths[index];
    auto fit = room.lower_bound({length, 0});
    std::size_t row = rows.size();
    std::int64_t left = capacity;
    if (fit == room.end()) {
      rows.emplace_back();
    } else {
      left = fit->first;
      row = fit->second;
      room.erase(fit);
    }
    rows[row].push_back(index);
    room.emplace(left - length, row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native helpers of rlhf_kernels.";
  module.def("build_info", &build_info, "Compiler, language standard, build type and version.");
  module.def("pack_sequences", &pack_sequences, pybind11::arg("lengths"), pybind11::arg("capacity"),
             pybind11::call_guard<pybind11::gil_scoped_release>(), "Rows of indices; see rlhf_kernels.pack_sequences.");
}
