// Memory to receive into, kept warm between pulls.
//
// Fresh pages cost more than the copy that fills them (measured: 4 KiB pages
// 1.4 GB/s, huge pages 4.8, recycled memory 7 on one thread), so blocks are
// recycled by size class, and large ones are aligned and advised for huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>

#include "ray/rdt/loop.h"

namespace ray::rdt {

// Runs on: any thread. Allocate and Free may call mmap and munmap.
class Pool {
 public:
  static constexpr size_t kHugePage = 2 << 20;

  // Keeps at most max_free bytes that nobody uses.
  explicit Pool(size_t max_free) : max_free_(max_free) {}
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  // Aligned to 64 bytes at least. Throws std::bad_alloc once nothing free is left
  // to give back to the system.
  void *Allocate(size_t nbytes);
  // `nbytes` as it was given to Allocate.
  void Free(void *memory, size_t nbytes);
  // Gives back free blocks that nobody wanted for idle_s.
  void Trim(double idle_s);

  size_t used_bytes() const;
  size_t free_bytes() const;

  // What a block of nbytes really takes.
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
  // The blocks of free_ by class, the one freed last (still in cache) at the back.
  std::map<size_t, std::list<FreeList::iterator>> by_class_;
  size_t used_bytes_ = 0;
  size_t free_bytes_ = 0;
};

}  // namespace ray::rdt
