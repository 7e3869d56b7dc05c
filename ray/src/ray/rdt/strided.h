// The memory of a strided tensor, as runs of adjacent bytes.
#pragma once

#include <cstdint>
#include <vector>

namespace ray::rdt {

// The runs of a tensor, in the order of their addresses. Copied one after the other, they
// are the tensor with `strides`.
struct Runs {
  uint64_t nbytes = 0;           // of each
  std::vector<uint64_t> starts;  // in bytes from the tensor's first element
  std::vector<int64_t> strides;  // of the copy, in elements

  uint64_t total() const { return nbytes * starts.size(); }
};

// Finds the runs of a tensor that is not empty. False if there are more than `max_count`
// runs, or if runs overlap. Runs on: any thread.
bool FindRuns(const int64_t *shape,
              const int64_t *strides,
              int ndim,
              uint64_t itemsize,
              uint64_t max_count,
              Runs *runs);

}  // namespace ray::rdt
