#include "ray/rdt/lanes/ring.h"

#include <sys/mman.h>

namespace ray::rdt {

std::shared_ptr<RingMemory> RingMemory::Create(uint64_t nbytes) {
  std::shared_ptr<MemoryFile> file = MemoryFile::Create(nbytes);
  void *memory = file ? file->Map(nullptr, nbytes, MAP_SHARED, 0) : MAP_FAILED;
  if (memory == MAP_FAILED) return nullptr;
  return std::shared_ptr<RingMemory>(
      new RingMemory(std::move(file), static_cast<char *>(memory)));
}

RingMemory::~RingMemory() { munmap(memory_, file_->nbytes()); }

}  // namespace ray::rdt
