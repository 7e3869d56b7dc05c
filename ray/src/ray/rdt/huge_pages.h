// Moves memory that is transferred often to huge pages.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "ray/rdt/copy_pool.h"
#include "ray/rdt/spans.h"

namespace ray::rdt {

// A copy over pages of 4 KiB takes up to several times as long as over huge pages: the
// kernel pins each page to read another process's memory, and a virtual machine
// translates each address twice. So a copy thread collapses memory that is transferred
// often (MADV_COLLAPSE, Linux 6.1). If the system refuses, the memory stays as it is.
// Contents and addresses do not change.
//
// Runs on: the agent's loop; collapses on a copy thread.
class HugePages {
 public:
  explicit HugePages(CopyPool *copies) : copies_(copies) {}

  // Counts a pull that read or wrote this memory. `keep` keeps the memory alive until it
  // is collapsed. Without it the memory may be freed, and other memory at its address may
  // be collapsed instead.
  void RecordPull(const SpanList &memory, std::shared_ptr<const void> keep);
  // Collapses memory now. May be called on any thread.
  void Collapse(const Span &span, std::shared_ptr<const void> keep);
  // Tells whether memory that was transferred so often is to be collapsed.
  static bool IsDue(unsigned pulls);

 private:
  CopyPool *const copies_;
  std::map<std::pair<uint64_t, uint64_t>, unsigned> pulls_;  // by address and length
};

}  // namespace ray::rdt
