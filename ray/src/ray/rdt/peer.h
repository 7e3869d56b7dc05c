// An agent that this process pulls from.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ray/rdt/lanes/lane_kind.h"
#include "ray/rdt/pull.h"

namespace ray::rdt {

enum class Notice { kOwn, kFree };

struct Notices {
  std::vector<Key> owned;
  std::vector<Key> freed;

  bool empty() const { return owned.empty() && freed.empty(); }
};

// One-way messages from an owner to a producer, until they are sent.
// Runs on: any thread.
class NoticeQueue {
 public:
  // True if the queue was empty.
  bool Add(Notice notice, const Key &key) {
    std::lock_guard<std::mutex> lock(mutex_);
    bool was_empty = notices_.empty();
    (notice == Notice::kOwn ? notices_.owned : notices_.freed).push_back(key);
    return was_empty;
  }
  Notices TakeAll() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(notices_, {});
  }
  // Puts notices back in front of those added since.
  void PutBack(const Notices &before) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto &[owned, freed] = notices_;
    owned.insert(owned.begin(), before.owned.begin(), before.owned.end());
    freed.insert(freed.begin(), before.freed.begin(), before.freed.end());
  }
  bool is_empty() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return notices_.empty();
  }

 private:
  mutable std::mutex mutex_;
  Notices notices_;  // guarded by mutex_
};

// For each lane to one peer "ok" or the reason why it cannot be used, as a user may ask.
// Runs on: any thread.
class LaneReport {
 public:
  LaneReport() { reasons_.fill("not connected yet"); }
  LaneReasons Get() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return reasons_;
  }
  void Set(const LaneReasons &reasons) {
    std::lock_guard<std::mutex> lock(mutex_);
    reasons_ = reasons;
  }

 private:
  mutable std::mutex mutex_;
  LaneReasons reasons_;  // guarded by mutex_
};

// Runs on: the agent's loop, except Queue and Reasons (any thread).
class Peer {
 public:
  virtual ~Peer() = default;

  virtual void Submit(std::shared_ptr<Pull> pull) = 0;
  virtual void Submit(std::shared_ptr<Call> call, Bytes payload) = 0;
  // The caller has cancelled the pull or call.
  virtual void ForgetPull(uint64_t id) = 0;
  virtual void ForgetCall(uint64_t id) = 0;
  virtual void SendNotices() = 0;
  // Called once a second: detects a peer that no longer answers.
  virtual void Tick() = 0;
  // True if the peer has no connection and no work.
  virtual bool is_idle() const = 0;
  // Fails all pulls and calls and closes. Nothing is submitted afterwards.
  virtual void Shutdown(const Status &why) = 0;

  // True if the caller must post SendNotices: the queue was empty.
  bool Queue(Notice notice, const Key &key) { return notice_queue_.Add(notice, key); }
  LaneReasons Reasons() const { return lane_report_.Get(); }

 protected:
  NoticeQueue notice_queue_;
  LaneReport lane_report_;
};

}  // namespace ray::rdt
