// Memory that processes of one host share: a memfd of a fixed size.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "ray/rdt/fd.h"
#include "ray/rdt/spans.h"
#include "ray/rdt/status.h"

namespace ray::rdt {

// The size is sealed, so an access to a mapping never goes beyond the end of the file.
//
// Runs on: any thread.
class MemoryFile {
 public:
  // Empty, with errno set, if the system fails.
  static std::shared_ptr<MemoryFile> Create(uint64_t nbytes);
  // Empty unless the descriptor is a memfd with that size, sealed.
  static std::shared_ptr<MemoryFile> Open(Fd fd, uint64_t nbytes);

  // Copies a range of memory to a position. Uses system calls, not a mapping: if the
  // source was freed the call fails, while a plain copy would crash the process.
  Status Write(uint64_t position, const SpanList &memory, Range range) const;
  // Copies from a position to a range of memory.
  Status Read(uint64_t position, const SpanList &memory, Range range) const;
  // Maps the pages from a position on. MAP_FAILED, with errno set, if the system fails.
  void *Map(void *at, uint64_t nbytes, int flags, uint64_t position) const;
  // Forbids writes but through mappings that exist. False on a kernel that cannot
  // (before 5.1).
  bool SealWrites() const;
  // Another descriptor of the file. Empty, with errno set, if none is left.
  Fd Duplicate() const;

  uint64_t nbytes() const { return nbytes_; }

 private:
  MemoryFile(Fd fd, uint64_t nbytes) : fd_(std::move(fd)), nbytes_(nbytes) {}

  const Fd fd_;
  const uint64_t nbytes_;
};

// Files that came with a grant. A null one does not match its description.
using MemoryFiles = std::vector<std::shared_ptr<const MemoryFile>>;

// The use of another process's file, which that process may want to use again.
//
// Runs on: any thread.
class FileLease {
 public:
  virtual ~FileLease() = default;
  // The file may stay mapped somewhere: its owner must not use it again.
  virtual void Abandon() = 0;
};

// Memory of this process that is mapped from a file.
struct FilePlace {
  std::shared_ptr<const MemoryFile> file;  // empty: not in a file
  uint64_t position = 0;
  bool is_private = false;           // pages that were written to are not in the file
  std::shared_ptr<FileLease> lease;  // empty for a file of this process
};

// True if a private mapping of a file still has all bytes of the file: no page of it was
// written to.
bool IsUnwritten(const Span &mapped);

}  // namespace ray::rdt
