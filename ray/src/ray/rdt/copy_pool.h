// The copy threads, shared evenly by all transfers.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "ray/rdt/loop.h"

namespace ray::rdt {

// Runs on: Add from any thread; steps on the copy threads ("rdt-copy-N"). Each
// copy thread is a Loop, so it serves sockets between two steps.
class CopyPool {
 public:
  // Copies one chunk. True if there may be more.
  using Step = std::function<bool()>;

  explicit CopyPool(int threads);

  void Start();
  void Stop();  // drops queued steps

  // Runs `step` repeatedly on up to `parallel` threads at once. After each run it goes to
  // the back of the queue, so that it takes turns with other steps.
  void Add(Step step, int parallel);

  int threads() const { return static_cast<int>(loops_.size()); }
  Loop *loop(size_t index) { return loops_[index % loops_.size()].get(); }

 private:
  void Turn(size_t thread);
  void Wake(size_t thread);

  std::vector<std::unique_ptr<Loop>> loops_;
  std::mutex mutex_;
  std::deque<std::shared_ptr<Step>> queue_;  // guarded by mutex_
  std::vector<bool> is_busy_;                // guarded by mutex_
};

}  // namespace ray::rdt
