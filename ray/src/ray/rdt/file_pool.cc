#include "ray/rdt/file_pool.h"

#include <sys/mman.h>

#include "ray/rdt/limits.h"
#include "ray/rdt/pool.h"

namespace ray::rdt {

std::shared_ptr<MappedFile> MappedFile::Create(uint64_t nbytes) {
  std::shared_ptr<MemoryFile> file = MemoryFile::Create(nbytes);
  void *block = file ? Pool::MapBlock(nbytes) : nullptr;
  if (block == nullptr) return nullptr;
  if (file->Map(block, nbytes, MAP_SHARED | MAP_FIXED, 0) == MAP_FAILED) {
    munmap(block, nbytes);
    return nullptr;
  }
  // Consumers map it privately. None of them can change what the others get.
  file->SealWrites();
  return std::shared_ptr<MappedFile>(new MappedFile(std::move(file), block));
}

MappedFile::~MappedFile() { munmap(memory_, nbytes()); }

std::shared_ptr<MappedFile> FilePool::Take(uint64_t nbytes) {
  uint64_t size = Pool::ClassOf(nbytes);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (used_ >= limits::kMaxFiles) return nullptr;
    ++used_;
    // The newest first: its bytes may still be in the cache.
    for (auto at = free_.rbegin(); at != free_.rend(); ++at) {
      if (at->file->nbytes() != size) continue;
      std::shared_ptr<MappedFile> file = std::move(at->file);
      free_.erase(std::next(at).base());
      free_bytes_ -= size;
      return file;
    }
  }
  if (limit_.IsNear(size)) Trim(0);
  std::shared_ptr<MappedFile> file = MappedFile::Create(size);
  if (!file) {
    Trim(0);  // unused files may be the memory that is missing
    file = MappedFile::Create(size);
  }
  if (!file) Return(nullptr, false);
  return file;
}

void FilePool::Return(std::shared_ptr<MappedFile> file, bool is_reusable) {
  if (is_reusable && HugePages::IsDue(file->CountUse()) &&
      file->nbytes() >= limits::kMinCollapsedSpan) {
    huge_pages_->Collapse({file->address(), file->nbytes()}, file);
  }
  std::list<Unused> dropped;
  std::lock_guard<std::mutex> lock(mutex_);
  --used_;
  if (!is_reusable) return;
  free_bytes_ += file->nbytes();
  free_.push_back({std::move(file), Clock::now()});
  while (free_bytes_ > max_free_ || free_.size() > limits::kMaxFiles) {
    DropOldestLocked(&dropped);
  }
}

void FilePool::Trim(double idle_s) {
  Clock::time_point limit = Clock::now() - std::chrono::duration_cast<Clock::duration>(
                                               std::chrono::duration<double>(idle_s));
  std::list<Unused> dropped;
  std::lock_guard<std::mutex> lock(mutex_);
  while (!free_.empty() && free_.front().since <= limit) DropOldestLocked(&dropped);
}

uint64_t FilePool::free_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return free_bytes_;
}

void FilePool::DropOldestLocked(std::list<Unused> *dropped) {
  free_bytes_ -= free_.front().file->nbytes();
  dropped->splice(dropped->end(), free_, free_.begin());
}

}  // namespace ray::rdt
