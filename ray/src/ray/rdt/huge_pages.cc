#include "ray/rdt/huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "ray/rdt/limits.h"
#include "ray/rdt/pool.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // since Linux 6.1; older headers lack it
#endif

namespace ray::rdt {
namespace {

// Collapses the whole huge pages within a span, piece by piece.
class CollapseJob {
 public:
  CollapseJob(std::shared_ptr<const void> keep, const Span &span)
      : keep_(std::move(keep)),
        next_((span.address + Pool::kHugePage - 1) / Pool::kHugePage * Pool::kHugePage),
        end_((span.address + span.nbytes) / Pool::kHugePage * Pool::kHugePage) {}

  // Collapses one piece. True if there are more. Pages in use at the moment are skipped.
  bool Step() {
    if (next_ >= end_) return false;
    uint64_t nbytes = std::min(limits::kCollapseBytesPerTurn, end_ - next_);
    int failed = madvise(reinterpret_cast<void *>(next_), nbytes, MADV_COLLAPSE);
    next_ += nbytes;
    return failed == 0 || errno == EAGAIN || errno == EBUSY;
  }

 private:
  const std::shared_ptr<const void> keep_;
  uint64_t next_;
  const uint64_t end_;
};

}  // namespace

void HugePages::RecordPull(const SpanList &memory, std::shared_ptr<const void> keep) {
  for (const Span &span : memory.spans()) {
    if (span.nbytes < limits::kMinCollapsedSpan) continue;
    if (pulls_.size() >= limits::kMaxCountedSpans) pulls_.clear();
    if (IsDue(++pulls_[{span.address, span.nbytes}])) Collapse(span, keep);
  }
}

void HugePages::Collapse(const Span &span, std::shared_ptr<const void> keep) {
  auto job = std::make_shared<CollapseJob>(std::move(keep), span);
  copies_->Add([job] { return job->Step(); }, 1);
}

// 3, 6, 12, 24 ...
bool HugePages::IsDue(unsigned pulls) {
  return pulls % limits::kPullsBeforeCollapse == 0 &&
         std::has_single_bit(pulls / limits::kPullsBeforeCollapse);
}

}  // namespace ray::rdt
