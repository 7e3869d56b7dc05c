// The shared memory of the shm lane: a memfd that both sides have mapped.
#pragma once

#include <cstdint>
#include <memory>

#include "ray/rdt/fd.h"

namespace ray::rdt {

// A mapping that lives as long as anyone copies through it.
// Runs on: any thread.
class RingMemory {
 public:
  static constexpr uint64_t kMaxBytes = 64 << 20;

  // The consumer's side: a new memfd, which can no longer change its size.
  // Empty with errno set if the system has none.
  static std::shared_ptr<RingMemory> Create(uint64_t nbytes, Fd *fd);
  // The producer's side. Empty unless the descriptor really is a memfd of that
  // size that cannot shrink: a later access must not fault.
  static std::shared_ptr<RingMemory> Open(int fd, uint64_t nbytes);

  ~RingMemory();
  RingMemory(const RingMemory &) = delete;
  RingMemory &operator=(const RingMemory &) = delete;

  char *at(uint64_t position) const { return memory_ + position; }
  uint64_t nbytes() const { return nbytes_; }

 private:
  RingMemory(char *memory, uint64_t nbytes) : memory_(memory), nbytes_(nbytes) {}

  char *const memory_;
  const uint64_t nbytes_;
};

}  // namespace ray::rdt
