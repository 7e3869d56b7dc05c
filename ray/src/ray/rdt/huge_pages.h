// Moves memory that consumers read again and again to huge pages.
#pragma once

#include <cstdint>
#include <map>
#include <utility>

#include "ray/rdt/copy_pool.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// For a read from another process the kernel pins each page on its own, which costs
// about as much as copying 4 KiB. So memory of small pages that has been read often
// enough is collapsed (MADV_COLLAPSE, Linux 6.1) by a copy thread, once. The system
// may not want to; then it stays as it is. Contents and addresses do not change.
//
// Runs on: the agent's loop; the collapsing, on a copy thread.
class HugePages {
 public:
  explicit HugePages(CopyPool *copies) : copies_(copies) {}

  // A consumer has read this out of our memory.
  void NoteRead(const Pin &pin);

  static constexpr int kReads = 3;
  static constexpr uint64_t kMinSpan = 16 << 20;

 private:
  // Forgotten all together beyond so many: memory that comes and goes.
  static constexpr size_t kMaxSpans = 1024;

  CopyPool *const copies_;
  std::map<std::pair<uint64_t, uint64_t>, int> reads_;  // by address and length
};

}  // namespace ray::rdt
