// The shared memory of the shm lane: a memfd that the consumer has mapped, and that
// the producer writes to as to a file.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "ray/rdt/fd.h"
#include "ray/rdt/spans.h"
#include "ray/rdt/status.h"

namespace ray::rdt {

// The consumer's side: a mapping that lives as long as anyone copies out of it.
// Runs on: any thread.
class RingMemory {
 public:
  // A new memfd, which can no longer change its size. Empty with errno set if the
  // system has none.
  static std::shared_ptr<RingMemory> Create(uint64_t nbytes, Fd *fd);

  ~RingMemory();
  RingMemory(const RingMemory &) = delete;
  RingMemory &operator=(const RingMemory &) = delete;

  char *at(uint64_t position) const { return memory_ + position; }

 private:
  RingMemory(char *memory, uint64_t nbytes) : memory_(memory), nbytes_(nbytes) {}

  char *const memory_;
  const uint64_t nbytes_;
};

// The producer's side. It writes by system calls, not through a mapping: memory that
// is gone fails the call, where plain copying would end the process.
// Runs on: any thread.
class RingFile {
 public:
  // Empty unless the descriptor really is a memfd of that size that stays so.
  static std::shared_ptr<RingFile> Open(Fd fd, uint64_t nbytes);

  // Copies a range of memory to a position.
  Status Fill(uint64_t position, const SpanList &memory, Range range) const;
  uint64_t nbytes() const { return nbytes_; }

 private:
  RingFile(Fd fd, uint64_t nbytes) : fd_(std::move(fd)), nbytes_(nbytes) {}

  const Fd fd_;
  const uint64_t nbytes_;
};

}  // namespace ray::rdt
