// An agent that this process pulls from, as the rest of the agent sees it.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "ray/rdt/connector.h"
#include "ray/rdt/copy_pool.h"
#include "ray/rdt/counters.h"
#include "ray/rdt/events.h"
#include "ray/rdt/huge_pages.h"
#include "ray/rdt/lanes/lane_kind.h"
#include "ray/rdt/pull.h"

namespace ray::rdt {

// Limits and choices that the user set.
struct Settings {
  std::string bind_ip;
  LaneSet lanes = 0;
  int copy_threads = 2;
  int tcp_streams = 4;
  uint64_t pool_bytes = 0;
  double connect_timeout_s = 10;
  double peer_timeout_s = 30;
  bool clear_tcp = true;  // false: nothing of ours may cross the network in the clear
};

// What every peer works with; owned by the agent, which outlives its peers.
struct Context {
  Loop *loop;
  CopyPool *copies;
  HugePages *huge_pages;
  EventQueue *events;
  Log *log;
  Counters *counters;
  const Settings *settings;
  const Identity *identity;
  const Address *self;
};

// What an owner tells a producer about objects.
enum class Notice { kOwn, kFree };

struct Notices {
  std::vector<Key> owned;
  std::vector<Key> freed;

  bool empty() const { return owned.empty() && freed.empty(); }
};

// Runs on: the agent's loop, but for Queue and Reasons (any thread).
class Peer {
 public:
  virtual ~Peer() = default;

  virtual void Submit(std::shared_ptr<Pull> pull) = 0;
  virtual void Submit(std::shared_ptr<Call> call, Bytes payload) = 0;
  // The caller of the pull or call has given up on it.
  virtual void ForgetPull(uint64_t id) = 0;
  virtual void ForgetCall(uint64_t id) = 0;
  virtual void SendNotices() = 0;
  // Once in a while: looks for a peer that no longer answers.
  virtual void Tick() = 0;
  // True when the peer holds no connection and no work.
  virtual bool is_idle() const = 0;
  // Fails all that is under way and closes. Nothing is submitted afterwards.
  virtual void Shutdown(const Status &why) = 0;

  // True if SendNotices must be posted: the first notice since the last one.
  bool Queue(Notice notice, const Key &key);
  LaneReasons Reasons() const;

 protected:
  Notices TakeNotices();
  // Before all that were queued since.
  void PutBackNotices(Notices notices);
  bool HasNotices() const;
  void SetReasons(const LaneReasons &reasons);

 private:
  mutable std::mutex mutex_;
  Notices notices_;  // guarded by mutex_
  LaneReasons reasons_{
      "not settled yet", "not settled yet", "not settled yet", "not settled yet"};
};

}  // namespace ray::rdt
