// The files with one object's bytes, which consumers of the host map.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "ray/rdt/copy_pool.h"
#include "ray/rdt/file_pool.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// Memory that does not change and is in files already stays there. The rest is copied
// into one file.
//
// Runs on: the agent's loop, except the destructor (any thread); fills on the copy
// threads.
class SharedCopy : public std::enable_shared_from_this<SharedCopy> {
 public:
  using OnReady = std::function<void(const Status &status)>;
  using Files = std::vector<std::shared_ptr<const MemoryFile>>;

  // Empty if there is no memory for it.
  static std::shared_ptr<SharedCopy> Create(const Pin &pin, FilePool *pool);
  ~SharedCopy();

  // Starts to copy. Until then WhenReady only queues.
  void Fill(Loop *loop, CopyPool *copies, Pin pin);
  // Runs `ready` once the bytes are there, or could not be read.
  void WhenReady(OnReady ready);
  // Another process may keep the files mapped: they are not used for other objects.
  void Abandon();

  // The places of the object's spans: position in the file, and size.
  const std::vector<Span> &layout() const { return layout_; }
  // For each span the number of its file.
  const std::vector<uint8_t> &file_of() const { return file_of_; }
  const Files &files() const { return files_; }

 private:
  class FillJob;

  explicit SharedCopy(FilePool *pool) : pool_(pool) {}
  bool Place(size_t span, const FilePlace &place);
  bool PlaceCopies(const std::vector<size_t> &spans);
  void OnFilled(const Status &status);

  FilePool *const pool_;
  std::vector<Span> layout_;
  std::vector<uint8_t> file_of_;
  Files files_;
  std::vector<std::shared_ptr<FileLease>> leases_;
  // The rest: where the copy threads read and write.
  std::shared_ptr<MappedFile> copy_;
  std::vector<Span> sources_;
  std::vector<Span> targets_;
  std::atomic<bool> is_reusable_{true};
  bool is_settled_ = false;
  Status status_;
  std::vector<OnReady> waiting_;
};

}  // namespace ray::rdt
