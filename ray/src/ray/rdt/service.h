// The producer's half: answers the agents that pull from here.
#pragma once

#include <functional>
#include <map>
#include <memory>

#include "ray/rdt/auth.h"
#include "ray/rdt/channel.h"
#include "ray/rdt/copy_pool.h"
#include "ray/rdt/counters.h"
#include "ray/rdt/events.h"
#include "ray/rdt/huge_pages.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// Runs on: the agent's loop.
class Service {
 public:
  using Answer = std::function<void(bool is_error, Bytes payload)>;

  Service(Loop *loop,
          CopyPool *copies,
          HugePages *huge_pages,
          RegionTable *regions,
          EventQueue *events,
          Log *log,
          Counters *counters);
  ~Service();

  // A connection that proved itself, for control or data.
  void Enter(std::shared_ptr<Channel> channel, const PeerFacts &peer);

  // Hands a call to the Python side; `answer` runs when that replies.
  void Ask(const AgentId &from, ByteView payload, Answer answer);
  // Has the copy threads find an object's checksum, unless it is known.
  void Sum(const Key &key, Answer answer);
  // False when nobody waits for that call any more.
  bool Reply(uint64_t call, bool is_error, Bytes payload);

  size_t pinned() const { return pins_->size(); }
  uint64_t pinned_bytes() const { return pins_->nbytes(); }
  void Shutdown();

 private:
  class Guest;

  void Leave(Guest *guest);
  void Serve(Fd fd, const AgentId &consumer);

  Loop *const loop_;
  CopyPool *const copies_;
  HugePages *const huge_pages_;
  RegionTable *const regions_;
  EventQueue *const events_;
  Log *const log_;
  Counters *const counters_;
  const std::shared_ptr<PinTable> pins_ = std::make_shared<PinTable>();
  uint64_t next_source_ = 0;
  std::map<Guest *, std::unique_ptr<Guest>> guests_;
  uint64_t next_call_ = 1;
  std::map<uint64_t, Answer> answers_;
};

}  // namespace ray::rdt
