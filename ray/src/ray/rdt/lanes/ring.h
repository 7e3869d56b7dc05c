// The shared memory of the shm lane: a file that the consumer maps and the producer
// writes to.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "ray/rdt/memory_file.h"

namespace ray::rdt {

// The consumer's mapping, kept alive while a thread copies from it.
// Runs on: any thread.
class RingMemory {
 public:
  // Empty, with errno set, if the system fails.
  static std::shared_ptr<RingMemory> Create(uint64_t nbytes);

  ~RingMemory();
  RingMemory(const RingMemory &) = delete;
  RingMemory &operator=(const RingMemory &) = delete;

  char *at(uint64_t position) const { return memory_ + position; }
  const MemoryFile &file() const { return *file_; }

 private:
  RingMemory(std::shared_ptr<MemoryFile> file, char *memory)
      : file_(std::move(file)), memory_(memory) {}

  const std::shared_ptr<MemoryFile> file_;
  char *const memory_;
};

}  // namespace ray::rdt
