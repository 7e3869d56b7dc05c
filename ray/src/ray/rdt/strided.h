// How a strided tensor lies in memory: as runs of adjacent bytes.
#pragma once

#include <cstdint>
#include <vector>

namespace ray::rdt {

// A tensor's elements without the gaps between them, in the order of memory.
//
// A copy of the runs, one after the other, is the tensor again with `strides`.
struct Runs {
  uint64_t nbytes = 0;           // of each
  std::vector<uint64_t> starts;  // in bytes from the tensor's first element
  std::vector<int64_t> strides;  // of the copy, in elements

  uint64_t total() const { return nbytes * starts.size(); }
};

// Finds the runs of a tensor that has elements. False where there are more than
// `max_count`, or where one begins within another. Runs on: any thread.
bool FindRuns(const int64_t *shape,
              const int64_t *strides,
              int ndim,
              uint64_t itemsize,
              uint64_t max_count,
              Runs *runs);

}  // namespace ray::rdt
