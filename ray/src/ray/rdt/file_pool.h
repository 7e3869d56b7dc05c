// Files that an agent copies objects into for the consumers of its host, reused between
// objects.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

#include "ray/rdt/huge_pages.h"
#include "ray/rdt/loop.h"
#include "ray/rdt/memory_file.h"
#include "ray/rdt/memory_limit.h"

namespace ray::rdt {

// A memory file and this process's mapping of all of it. Runs on: any thread.
class MappedFile {
 public:
  // Aligned to huge pages. Empty, with errno set, if the system fails.
  static std::shared_ptr<MappedFile> Create(uint64_t nbytes);
  ~MappedFile();
  MappedFile(const MappedFile &) = delete;
  MappedFile &operator=(const MappedFile &) = delete;

  uint64_t address() const { return reinterpret_cast<uint64_t>(memory_); }
  uint64_t nbytes() const { return file_->nbytes(); }
  const std::shared_ptr<MemoryFile> &file() const { return file_; }
  // Counts an object, and returns how many there were.
  unsigned CountUse() { return ++uses_; }

 private:
  MappedFile(std::shared_ptr<MemoryFile> file, void *memory)
      : file_(std::move(file)), memory_(memory) {}

  const std::shared_ptr<MemoryFile> file_;
  void *const memory_;
  unsigned uses_ = 0;
};

// A file's pages stay allocated, because to allocate them takes as long as to copy.
//
// Runs on: any thread.
class FilePool {
 public:
  // Keeps at most max_free unused bytes. Before it takes more memory near the limit, it
  // returns all unused bytes to the system.
  FilePool(uint64_t max_free, HugePages *huge_pages)
      : max_free_(max_free), huge_pages_(huge_pages) {}

  // A file of nbytes or slightly more. Empty if too many are in use or the system fails.
  std::shared_ptr<MappedFile> Take(uint64_t nbytes);
  // Call once the copy is no longer needed. Keeps the file only if no other process has
  // it mapped.
  void Return(std::shared_ptr<MappedFile> file, bool is_reusable);
  // Drops files that were unused for idle_s.
  void Trim(double idle_s);
  uint64_t free_bytes() const;

 private:
  struct Unused {
    std::shared_ptr<MappedFile> file;
    Clock::time_point since;
  };

  void DropOldestLocked(std::list<Unused> *dropped);

  const uint64_t max_free_;
  HugePages *const huge_pages_;
  const MemoryLimit limit_;
  mutable std::mutex mutex_;
  std::list<Unused> free_;  // guarded by mutex_, oldest first
  uint64_t free_bytes_ = 0;
  size_t used_ = 0;  // files
};

}  // namespace ray::rdt
