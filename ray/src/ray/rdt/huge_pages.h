// Moves memory that is pulled out of or into again and again to huge pages.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "ray/rdt/copy_pool.h"
#include "ray/rdt/spans.h"

namespace ray::rdt {

// Over pages of 4 KiB a copy costs up to several times what it costs over huge ones:
// the kernel pins each page on its own to read another process's memory, and a
// virtual machine translates each address twice. So memory that has been pulled
// often enough is collapsed (MADV_COLLAPSE, Linux 6.1) by a copy thread. The system
// may not want to; then it stays as it is. Contents and addresses do not change.
//
// Runs on: the agent's loop; the collapsing, on a copy thread.
class HugePages {
 public:
  explicit HugePages(CopyPool *copies) : copies_(copies) {}

  // A pull has ended that read or wrote this memory of ours. `keep` holds it until
  // the collapsing has ended; without it the memory may go at any time, and what
  // comes to lie there instead is collapsed.
  void RecordPull(const SpanList &memory, std::shared_ptr<const void> keep);

 private:
  CopyPool *const copies_;
  std::map<std::pair<uint64_t, uint64_t>, unsigned> pulls_;  // by address and length
};

}  // namespace ray::rdt
