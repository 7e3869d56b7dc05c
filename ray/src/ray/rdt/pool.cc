#include "ray/rdt/pool.h"

#include <sys/mman.h>

#include <bit>
#include <cstdlib>
#include <new>

#include "ray/rdt/limits.h"

namespace ray::rdt {
namespace {

constexpr size_t kAlignment = 64;

size_t RoundUp(size_t value, size_t to) { return (value + to - 1) / to * to; }

void *NewBlock(size_t nbytes) {
  if (nbytes >= limits::kMinMappedBlock) return Pool::MapBlock(nbytes);
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

// Maps more and unmaps both ends.
void *Pool::MapBlock(size_t nbytes) {
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

Pool::~Pool() {
  for (FreeBlock &block : free_) DeleteBlock(block.memory, block.nbytes);
}

size_t Pool::ClassOf(size_t nbytes) {
  if (nbytes <= kAlignment) return kAlignment;
  size_t power = std::bit_ceil(nbytes);
  if (power < limits::kMinMappedBlock) return power;
  return RoundUp(nbytes,
                 std::max<size_t>(limits::kPage,
                                  std::bit_floor(nbytes) / limits::kClassesPerDoubling));
}

void *Pool::Allocate(size_t nbytes) {
  size_t size = ClassOf(nbytes);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = by_class_.find(size);
    if (found != by_class_.end()) {
      FreeList recycled;
      DropLocked(found->second.back(), &recycled);
      return UseLocked(recycled.front().memory, size);
    }
  }
  if (size >= limits::kMinMappedBlock && limit_.IsNear(size)) Trim(0);
  void *memory = NewBlock(size);
  if (memory == nullptr) {
    Trim(0);  // unused blocks may be the memory that is missing
    memory = NewBlock(size);
  }
  if (memory == nullptr) throw std::bad_alloc();
  std::lock_guard<std::mutex> lock(mutex_);
  return UseLocked(memory, size);
}

void Pool::Free(void *memory, size_t nbytes) {
  size_t size = ClassOf(nbytes);
  FreeList dropped;
  FilePlace place;  // its lease is released last
  {
    std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ -= size;
    auto node = mapped_.extract(reinterpret_cast<uint64_t>(memory));
    if (node) place = std::move(node.mapped().place);
    if (place.file) {
      dropped.push_back({memory, size, {}});
    } else {
      free_bytes_ += size;
      free_.push_back({memory, size, Clock::now()});
      by_class_[size].push_back(std::prev(free_.end()));
    }
    while (free_bytes_ > max_free_) DropLocked(free_.begin(), &dropped);
  }
  for (FreeBlock &block : dropped) DeleteBlock(block.memory, block.nbytes);
}

void *Pool::AllocateInFile(size_t nbytes) {
  if (nbytes < limits::kMinMappedBlock) return Allocate(nbytes);
  size_t size = ClassOf(nbytes);
  std::shared_ptr<MemoryFile> file = MemoryFile::Create(size);
  void *memory = file ? MapBlock(size) : nullptr;
  if (memory == nullptr) return Allocate(nbytes);
  if (file->Map(memory, size, MAP_SHARED | MAP_FIXED, 0) == MAP_FAILED) {
    munmap(memory, size);
    return Allocate(nbytes);
  }
  file->SealWrites();
  std::lock_guard<std::mutex> lock(mutex_);
  UseLocked(memory, size);
  mapped_[reinterpret_cast<uint64_t>(memory)].place = {.file = std::move(file)};
  return memory;
}

bool Pool::IsMappedBlock(const Span &span) const {
  if (span.nbytes < limits::kMinMappedBlock) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  return mapped_.contains(span.address);
}

void Pool::Attach(uint64_t block, FilePlace place) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = mapped_.find(block);
  // An earlier lease is released after the lock.
  if (found != mapped_.end()) std::swap(found->second.place, place);
}

FilePlace Pool::PlaceOf(const Span &span) const {
  FilePlace place;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto after = mapped_.upper_bound(span.address);
    if (after == mapped_.begin()) return {};
    const auto &[block, mapped] = *std::prev(after);
    uint64_t skip = span.address - block;
    if (skip > mapped.nbytes || span.nbytes > mapped.nbytes - skip) return {};
    place = mapped.place;
    place.position += skip;
  }
  if (place.file && place.is_private && !IsUnwritten(span)) return {};
  return place;
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

void *Pool::UseLocked(void *memory, size_t size) {
  used_bytes_ += size;
  if (size >= limits::kMinMappedBlock) {
    mapped_[reinterpret_cast<uint64_t>(memory)] = {.nbytes = size, .place = {}};
  }
  return memory;
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
