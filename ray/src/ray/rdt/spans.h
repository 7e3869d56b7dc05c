// A list of memory spans, used as one sequence of bytes.
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

// Runs on: any thread; immutable. Does not own the memory of its spans.
class SpanList {
 public:
  // The most iovecs of one system call (IOV_MAX on Linux).
  static constexpr size_t kMaxIovecs = 1024;

  SpanList() = default;
  // Drops empty spans. The caller has checked the total with TotalOf.
  explicit SpanList(const std::vector<Span> &spans);

  uint64_t total() const { return total_; }
  const std::vector<Span> &spans() const { return spans_; }

  // Fills `out` with at most kMaxIovecs pieces from range.offset on. Returns the bytes of
  // the range that they cover.
  uint64_t Slice(Range range, std::vector<iovec> *out) const;

  // Calls visit(pointer, length) for each piece of the range.
  template <typename Visit>
  void ForEachPiece(Range range, Visit visit) const {
    std::vector<iovec> pieces;
    while (range.nbytes > 0) {
      uint64_t covered = Slice(range, &pieces);
      for (const iovec &piece : pieces) visit(piece.iov_base, piece.iov_len);
      range = {range.offset + covered, range.nbytes - covered};
    }
  }
  // Copies one buffer to the range.
  void CopyIn(Range range, const void *from) const;

 private:
  std::vector<Span> spans_;
  std::vector<uint64_t> starts_;  // logical offset of each span
  uint64_t total_ = 0;
};

// The sum of the sizes. False if it overflows or a span exceeds the address space.
bool TotalOf(const std::vector<Span> &spans, uint64_t *total);

// The same list, but throws std::invalid_argument where TotalOf is false.
SpanList CheckedSpans(const std::vector<Span> &spans);

}  // namespace ray::rdt
