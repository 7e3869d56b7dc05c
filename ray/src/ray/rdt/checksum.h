// Checksums of objects, for consumers that verify what they pull.
//
// An object's checksum is the sum, modulo 2^64, of the CRC-64/NVME of each block of
// its bytes, times 2n + 1 for block number n. So the blocks can be read in any order
// by any thread, each while it is still in the cache. An odd factor loses nothing of
// a CRC, and makes exchanged blocks another sum. It finds accidents, not forgers.
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

// The part of the checksum that `range` gives: it begins where a block does, and
// ends where a block or the list does.
uint64_t Checksum(const SpanList &memory, Range range);
// What block number `number` gives, whose bytes are at `data`.
uint64_t ChecksumOfBlock(const void *data, uint64_t nbytes, uint64_t number);

// A number that is computed once and told to all who ask.
class LazyChecksum {
 public:
  using Callback = std::function<void(uint64_t number)>;

  // Tells at once, or when Set has been called. True for the first who asks: that
  // one is to find the number out and Set it.
  bool Ask(Callback told);
  void Set(uint64_t number);

 private:
  std::mutex mutex_;
  bool is_asked_ = false;  // guarded by mutex_, as is all below
  std::optional<uint64_t> number_;
  std::vector<Callback> waiting_;
};

}  // namespace ray::rdt
