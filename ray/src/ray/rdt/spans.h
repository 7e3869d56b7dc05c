// A list of memory spans seen as one logical run of bytes.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <vector>

namespace ray::rdt {

struct Span {
  uint64_t address = 0;
  uint64_t nbytes = 0;
  bool operator==(const Span &) const = default;
};

struct Range {
  uint64_t offset = 0;
  uint64_t nbytes = 0;
};

// Immutable after construction, so any thread may read it. Does not own the
// memory that its spans name.
class SpanList {
 public:
  // Most iovecs that one system call takes (IOV_MAX on Linux).
  static constexpr size_t kMaxIovecs = 1024;

  SpanList() = default;
  // Drops empty spans. The caller has checked that the sum does not overflow
  // (see TotalOf).
  explicit SpanList(const std::vector<Span> &spans);

  uint64_t total() const { return total_; }
  const std::vector<Span> &spans() const { return spans_; }

  // Fills `out` with at most kMaxIovecs pieces that start at range.offset;
  // returns how many bytes of the range they cover.
  uint64_t Slice(Range range, std::vector<iovec> *out) const;

  // Copies range to or from plain memory.
  void CopyOut(Range range, void *to) const;
  void CopyIn(Range range, const void *from) const;

 private:
  std::vector<Span> spans_;
  std::vector<uint64_t> starts_;  // logical offset of each span
  uint64_t total_ = 0;
};

// Sum of lengths; false when it would overflow or a span wraps around the
// address space.
bool TotalOf(const std::vector<Span> &spans, uint64_t *total);

}  // namespace ray::rdt
