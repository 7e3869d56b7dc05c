// For each lane to one peer, whether it can be used, as a user may ask.
#pragma once

#include <mutex>

#include "ray/rdt/lanes/lane_kind.h"

namespace ray::rdt {

// Runs on: any thread.
class LaneReport {
 public:
  LaneReasons Get() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return reasons_;
  }
  void Set(const LaneReasons &reasons) {
    std::lock_guard<std::mutex> lock(mutex_);
    reasons_ = reasons;
  }

 private:
  static constexpr const char *kUnknown = "not connected yet";

  mutable std::mutex mutex_;
  LaneReasons reasons_{kUnknown, kUnknown, kUnknown, kUnknown};  // guarded by mutex_
};

}  // namespace ray::rdt
