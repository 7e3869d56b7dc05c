#include "ray/rdt/huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "ray/rdt/pool.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // of Linux 6.1; older headers lack it
#endif

namespace ray::rdt {
namespace {

// A turn on a copy thread: a few milliseconds.
constexpr uint64_t kPiece = 8 << 20;

// What lies wholly within a span, piece by piece. Holds the pin: the memory stays.
class CollapseJob {
 public:
  CollapseJob(Pin pin, const Span &span)
      : pin_(std::move(pin)),
        next_((span.address + Pool::kHugePage - 1) / Pool::kHugePage * Pool::kHugePage),
        end_((span.address + span.nbytes) / Pool::kHugePage * Pool::kHugePage) {}

  // One piece; true if there are more. Pages that are in use right now are left out.
  bool Step() {
    if (next_ >= end_) return false;
    uint64_t nbytes = std::min(kPiece, end_ - next_);
    int failed = madvise(reinterpret_cast<void *>(next_), nbytes, MADV_COLLAPSE);
    next_ += nbytes;
    return failed == 0 || errno == EAGAIN || errno == EBUSY;
  }

 private:
  const Pin pin_;
  uint64_t next_;
  const uint64_t end_;
};

}  // namespace

void HugePages::NoteRead(const Pin &pin) {
  for (const Span &span : pin->memory.spans()) {
    if (span.nbytes < kMinSpan) continue;
    if (reads_.size() >= kMaxSpans) reads_.clear();
    if (++reads_[{span.address, span.nbytes}] != kReads) continue;
    auto job = std::make_shared<CollapseJob>(pin, span);
    copies_->Add([job] { return job->Step(); }, 1);
  }
}

}  // namespace ray::rdt
