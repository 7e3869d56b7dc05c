// The shared memory of the shm lane: a memfd that the consumer maps and the producer
// writes to as a file.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "ray/rdt/fd.h"
#include "ray/rdt/spans.h"
#include "ray/rdt/status.h"

namespace ray::rdt {

// The consumer's side: a mapping, kept alive while a thread copies from it.
// Runs on: any thread.
class RingMemory {
 public:
  // Creates a memfd of a sealed size. Empty, with errno set, if the system fails.
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

// The producer's side. It writes by system calls, not through a mapping: if the source
// was freed the call fails, while a plain copy would crash the process. Runs on: any
// thread.
class RingFile {
 public:
  // Empty unless the descriptor is a memfd with that size, sealed.
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
