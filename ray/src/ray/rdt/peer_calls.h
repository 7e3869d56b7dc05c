// Requests to one peer that wait for a reply.
#pragma once

#include <map>
#include <memory>

#include "ray/rdt/peer_link.h"
#include "ray/rdt/peer_notices.h"
#include "ray/rdt/pull.h"

namespace ray::rdt {

// state     event                                       action               next state
// --------  ------------------------------------------  -------------------  ----------
// kQueued   connected                                   CALL or CHECKSUM     kSent
// kSent     REPLY                                       complete             (done)
// kSent     connection lost, call is idempotent         none                 kQueued
// kSent     connection lost, call is not idempotent     none                 kUncertain
// kUncertain  connected: the peer lives                 fail with kBroken    (done)
// kUncertain  unreachable                               fail                 (done)
// any       connection lost kMaxTries times             fail                 (done)
// any       the peer's process exited                   fail                 (done)
//
// Runs on: the agent's loop.
class PeerCalls {
 public:
  PeerCalls(PeerLink *link, PeerNotices *notices) : link_(link), notices_(notices) {}

  // Sends the call if there is a connection.
  void Add(std::shared_ptr<Call> call, Bytes payload);
  void Forget(uint64_t id) { calls_.erase(id); }
  void SendAll();
  // Fails the calls that the peer may have served or not.
  void FailUncertain();
  // False if the payload is malformed.
  bool OnReply(uint64_t id, ByteView payload);
  void OnLost(const Status &why, PeerLink::Loss loss);
  void FailAll(const Status &why);
  bool is_empty() const { return calls_.empty(); }

 private:
  enum class State { kQueued, kSent, kUncertain };
  struct PendingCall {
    std::shared_ptr<Call> call;
    Bytes payload;  // dropped once sent, unless it may be sent again
    State state = State::kQueued;
    int tries = 1;
  };

  void Send(uint64_t id, PendingCall *pending);
  static bool MayRetry(PendingCall *pending, PeerLink::Loss loss);

  PeerLink *const link_;
  PeerNotices *const notices_;
  std::map<uint64_t, PendingCall> calls_;
};

}  // namespace ray::rdt
