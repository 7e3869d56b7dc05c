// An agent that this process pulls from.
#pragma once

#include <memory>

#include "ray/rdt/lanes/lane_report.h"
#include "ray/rdt/notice_queue.h"
#include "ray/rdt/pull.h"

namespace ray::rdt {

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
