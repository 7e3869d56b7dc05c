// Checksums of objects, for consumers that verify what they receive.
//
// An object's checksum is the sum, modulo 2^64, over its blocks n of CRC-64/NVME times
// 2n + 1. So any thread can process any block, in any order, while it is in the cache.
// An odd factor is invertible and makes the sum depend on the order of the blocks. The
// checksum detects accidental corruption only.
//
// Runs on: any thread.
#pragma once

#include <functional>
#include <mutex>
#include <optional>
#include <vector>

#include "ray/rdt/spans.h"

namespace ray::rdt {

inline constexpr uint64_t kChecksumBlock = 256 << 10;

// The contribution of `range` to the checksum. It begins at a block, and ends at a block
// or at the end of the list.
uint64_t Checksum(const SpanList &memory, Range range);
// The contribution of block `number`, whose bytes are at `data`.
uint64_t ChecksumOfBlock(const void *data, uint64_t nbytes, uint64_t number);

// A checksum that is computed once, for all that request it.
class LazyChecksum {
 public:
  using Callback = std::function<void(uint64_t checksum)>;

  // Calls `callback` now if the checksum is set, or else from Set. True for the first
  // request: its caller must compute the checksum and call Set.
  bool Request(Callback callback);
  void Set(uint64_t checksum);

 private:
  std::mutex mutex_;
  bool is_requested_ = false;  // guarded by mutex_, as is all below
  std::optional<uint64_t> checksum_;
  std::vector<Callback> waiting_;
};

}  // namespace ray::rdt
