// Tasks for a loop that may have ended.
#pragma once

#include <mutex>
#include <utility>

#include "ray/rdt/loop.h"

namespace ray::rdt {

// Runs on: any thread. For owners that outlive the loop, as memory of the receive pool.
class Mailbox {
 public:
  explicit Mailbox(Loop *loop) : loop_(loop) {}

  void Post(Loop::Task task) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (loop_ != nullptr) loop_->Post(std::move(task));
  }
  // From then on tasks are dropped.
  void Close() {
    std::lock_guard<std::mutex> lock(mutex_);
    loop_ = nullptr;
  }

 private:
  std::mutex mutex_;
  Loop *loop_;  // guarded by mutex_
};

}  // namespace ray::rdt
