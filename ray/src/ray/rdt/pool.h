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

#include "ray/rdt/loop.h"

namespace ray::rdt {

// Runs on: any thread. Allocate and Free may call mmap and munmap.
class Pool {
 public:
  static constexpr size_t kHugePage = 2 << 20;

  // Keeps at most max_free unused bytes.
  explicit Pool(size_t max_free) : max_free_(max_free) {}
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  // Aligned to 64 bytes at least. Before it throws std::bad_alloc, it returns all unused
  // blocks to the system and tries again.
  void *Allocate(size_t nbytes);
  // `nbytes` as it was given to Allocate.
  void Free(void *memory, size_t nbytes);
  // Returns blocks that were unused for idle_s to the system.
  void Trim(double idle_s);

  size_t used_bytes() const;
  size_t free_bytes() const;

  // The size of the block for a request of nbytes.
  static size_t ClassOf(size_t nbytes);

 private:
  struct FreeBlock {
    void *memory;
    size_t nbytes;
    Clock::time_point since;
  };
  using FreeList = std::list<FreeBlock>;

  void DropLocked(FreeList::iterator block, FreeList *dropped);

  const size_t max_free_;
  mutable std::mutex mutex_;
  FreeList free_;  // guarded by mutex_, oldest first
  // The blocks of free_ by class; the one freed last (still in the cache) at the back.
  std::map<size_t, std::list<FreeList::iterator>> by_class_;
  size_t used_bytes_ = 0;
  size_t free_bytes_ = 0;
};

}  // namespace ray::rdt
