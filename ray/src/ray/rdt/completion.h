// A result that a caller waits for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>

#include "ray/rdt/fd.h"
#include "ray/rdt/status.h"

namespace ray::rdt {

// Runs on: any thread. Settles exactly once. `live` counts those that have not settled.
class Completion {
 public:
  explicit Completion(std::atomic<int64_t> *live) : live_(live) { ++*live_; }
  virtual ~Completion() = default;

  bool is_settled() const;
  // Ok until settled.
  Status status() const;
  // Becomes readable when the completion settles. Created at the first call, so that
  // thousands of pulls do not need thousands of descriptors.
  int EventFd();
  // True if settled within timeout_s. Returns early when a signal arrives, unless no
  // descriptor is left.
  bool Wait(double timeout_s);

 protected:
  // Caller holds mutex_.
  void SettleLocked(const Status &status);

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // for waits on native threads
  std::optional<Status> settled_;    // guarded by mutex_

 private:
  int TryEventFd();  // -1 with errno set
  bool WaitWithoutFd(double timeout_s);

  std::atomic<int64_t> *const live_;
  Fd event_;  // guarded by mutex_
};

}  // namespace ray::rdt
