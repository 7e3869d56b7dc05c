#include "ray/rdt/spans.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace ray::rdt {

SpanList::SpanList(const std::vector<Span> &spans) {
  spans_.reserve(spans.size());
  starts_.reserve(spans.size());
  for (const Span &span : spans) {
    if (span.nbytes == 0) continue;
    spans_.push_back(span);
    starts_.push_back(total_);
    total_ += span.nbytes;
  }
}

uint64_t SpanList::Slice(Range range, std::vector<iovec> *out) const {
  out->clear();
  uint64_t covered = 0;
  auto after = std::upper_bound(starts_.begin(), starts_.end(), range.offset);
  size_t at = static_cast<size_t>(after - starts_.begin()) - 1;
  uint64_t skip = range.offset - starts_[at];
  while (covered < range.nbytes && out->size() < kMaxIovecs) {
    uint64_t take = std::min(spans_[at].nbytes - skip, range.nbytes - covered);
    out->push_back({reinterpret_cast<void *>(spans_[at].address + skip), take});
    covered += take;
    skip = 0;
    ++at;
  }
  return covered;
}

void SpanList::CopyIn(Range range, const void *from) const {
  const auto *next = static_cast<const char *>(from);
  ForEachPiece(range, [&next](void *memory, size_t nbytes) {
    std::memcpy(memory, next, nbytes);
    next += nbytes;
  });
}

bool TotalOf(const std::vector<Span> &spans, uint64_t *total) {
  *total = 0;
  for (const Span &span : spans) {
    uint64_t end = 0;
    if (__builtin_add_overflow(span.address, span.nbytes, &end)) return false;
    if (__builtin_add_overflow(*total, span.nbytes, total)) return false;
  }
  return true;
}

SpanList CheckedSpans(const std::vector<Span> &spans) {
  uint64_t total = 0;
  if (!TotalOf(spans, &total))
    throw std::invalid_argument("spans overflow the address space");
  return SpanList(spans);
}

}  // namespace ray::rdt
