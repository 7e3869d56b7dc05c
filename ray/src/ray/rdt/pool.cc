#include "ray/rdt/pool.h"

#include <sys/mman.h>

#include <bit>
#include <cstdlib>
#include <new>

#include "ray/rdt/limits.h"

namespace ray::rdt {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kPage = 4096;

size_t RoundUp(size_t value, size_t to) { return (value + to - 1) / to * to; }

// Maps memory at a huge-page boundary: maps more and unmaps both ends. Null if there is
// no memory.
void *MapBlock(size_t nbytes) {
  size_t whole = nbytes + Pool::kHugePage;
  void *raw =
      mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  uintptr_t begin = reinterpret_cast<uintptr_t>(raw);
  uintptr_t block = RoundUp(begin, Pool::kHugePage);
  if (block > begin) munmap(raw, block - begin);
  uintptr_t end = block + nbytes;
  if (begin + whole > end) munmap(reinterpret_cast<void *>(end), begin + whole - end);
  madvise(reinterpret_cast<void *>(block), nbytes, MADV_HUGEPAGE);  // only advice
  return reinterpret_cast<void *>(block);
}

void *NewBlock(size_t nbytes) {
  if (nbytes >= limits::kMinMappedBlock) return MapBlock(nbytes);
  return std::aligned_alloc(kAlignment, nbytes);
}

void DeleteBlock(void *memory, size_t nbytes) {
  if (nbytes >= limits::kMinMappedBlock) {
    munmap(memory, nbytes);
  } else {
    std::free(memory);
  }
}

}  // namespace

Pool::~Pool() {
  for (FreeBlock &block : free_) DeleteBlock(block.memory, block.nbytes);
}

size_t Pool::ClassOf(size_t nbytes) {
  if (nbytes <= kAlignment) return kAlignment;
  size_t power = std::bit_ceil(nbytes);
  if (power < limits::kMinMappedBlock) return power;
  return RoundUp(nbytes,
                 std::max(kPage, std::bit_floor(nbytes) / limits::kClassesPerDoubling));
}

void *Pool::Allocate(size_t nbytes) {
  size_t size = ClassOf(nbytes);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ += size;
    auto found = by_class_.find(size);
    if (found != by_class_.end()) {
      FreeList recycled;
      DropLocked(found->second.back(), &recycled);
      return recycled.front().memory;
    }
  }
  if (void *memory = NewBlock(size)) return memory;
  Trim(0);  // unused blocks may be the memory that is missing
  if (void *memory = NewBlock(size)) return memory;
  std::lock_guard<std::mutex> lock(mutex_);
  used_bytes_ -= size;
  throw std::bad_alloc();
}

void Pool::Free(void *memory, size_t nbytes) {
  size_t size = ClassOf(nbytes);
  FreeList dropped;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ -= size;
    free_bytes_ += size;
    free_.push_back({memory, size, Clock::now()});
    by_class_[size].push_back(std::prev(free_.end()));
    while (free_bytes_ > max_free_) DropLocked(free_.begin(), &dropped);
  }
  for (FreeBlock &block : dropped) DeleteBlock(block.memory, block.nbytes);
}

void Pool::Trim(double idle_s) {
  Clock::time_point limit = Clock::now() - std::chrono::duration_cast<Clock::duration>(
                                               std::chrono::duration<double>(idle_s));
  FreeList dropped;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    while (!free_.empty() && free_.front().since <= limit)
      DropLocked(free_.begin(), &dropped);
  }
  for (FreeBlock &block : dropped) DeleteBlock(block.memory, block.nbytes);
}

size_t Pool::used_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return used_bytes_;
}

size_t Pool::free_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return free_bytes_;
}

// Removes one block from the free lists. The oldest block of a class is at its front and
// the newest at its back, and callers pass one of these.
void Pool::DropLocked(FreeList::iterator block, FreeList *dropped) {
  auto found = by_class_.find(block->nbytes);
  if (found->second.front() == block) {
    found->second.pop_front();
  } else {
    found->second.pop_back();
  }
  if (found->second.empty()) by_class_.erase(found);
  free_bytes_ -= block->nbytes;
  dropped->splice(dropped->end(), free_, block);
}

}  // namespace ray::rdt
