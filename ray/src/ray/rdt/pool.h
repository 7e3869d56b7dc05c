// Memory to receive into, reused between pulls.
//
// To fill fresh pages takes longer than the copy itself (measured on one thread: 4 KiB
// pages 1.4 GB/s, huge pages 4.8, reused memory 7). So blocks are reused by size class,
// and large ones are aligned and advised for huge pages.
#pragma once

#include <cstddef>
#include <list>
#include <map>
#include <mutex>
#include <utility>

#include "ray/rdt/loop.h"
#include "ray/rdt/memory_file.h"
#include "ray/rdt/memory_limit.h"
#include "ray/rdt/spans.h"

namespace ray::rdt {

// Runs on: any thread. Allocate and Free may call mmap and munmap.
class Pool {
 public:
  static constexpr size_t kHugePage = 2 << 20;

  // Keeps at most max_free unused bytes. Before it takes more memory near the limit, it
  // returns all unused bytes to the system.
  explicit Pool(size_t max_free, MemoryLimit limit = MemoryLimit())
      : max_free_(max_free), limit_(std::move(limit)) {}
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  // Aligned to 64 bytes at least. Before it throws std::bad_alloc, it returns all unused
  // blocks to the system and tries again.
  void *Allocate(size_t nbytes);
  // `nbytes` as it was given to Allocate.
  void Free(void *memory, size_t nbytes);
  // Like Allocate, but the memory is in a file that consumers can map. Only a request
  // of less than kMinMappedBlock, and one that the system refuses, is not in a file.
  void *AllocateInFile(size_t nbytes);
  // True if the span is a block in use that has its own mapping.
  bool IsMappedBlock(const Span &span) const;
  // Call after a file was mapped at such a block, which then returns to the system when
  // it is freed. The lease is released after that.
  void Attach(uint64_t block, FilePlace place);
  // The place of the memory in a file. Without a file if it is in none, or was written to
  // since it was mapped.
  FilePlace PlaceOf(const Span &span) const;
  // Returns blocks that were unused for idle_s to the system.
  void Trim(double idle_s);

  size_t used_bytes() const;
  size_t free_bytes() const;

  // The size of the block for a request of nbytes.
  static size_t ClassOf(size_t nbytes);
  // Maps memory at a huge-page boundary. Null if there is no memory.
  static void *MapBlock(size_t nbytes);

 private:
  struct FreeBlock {
    void *memory;
    size_t nbytes;
    Clock::time_point since;
  };
  using FreeList = std::list<FreeBlock>;
  struct MappedBlock {
    size_t nbytes;
    FilePlace place;
  };

  void *UseLocked(void *memory, size_t size);
  void DropLocked(FreeList::iterator block, FreeList *dropped);

  const size_t max_free_;
  const MemoryLimit limit_;
  mutable std::mutex mutex_;
  FreeList free_;  // guarded by mutex_, oldest first
  // The blocks of free_ by class; the one freed last (still in the cache) at the back.
  std::map<size_t, std::list<FreeList::iterator>> by_class_;
  // The blocks in use that have their own mapping. Guarded by mutex_.
  std::map<uint64_t, MappedBlock> mapped_;
  size_t used_bytes_ = 0;
  size_t free_bytes_ = 0;
};

}  // namespace ray::rdt
