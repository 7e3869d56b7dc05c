// One-way messages to one peer: which objects this process owns or has freed.
#pragma once

#include <map>
#include <memory>
#include <optional>

#include "ray/rdt/context.h"
#include "ray/rdt/peer.h"
#include "ray/rdt/peer_link.h"

namespace ray::rdt {

// state        event                                   action             next state
// -----------  --------------------------------------  -----------------  -----------
// queued       Send, Flush                             OWN, FREE, PING    unconfirmed
// unconfirmed  PONG                                    none               (done)
// unconfirmed  connection lost                         none               queued
// any          the peer's process exited               none               (dropped)
// any          unreachable for kNoticesKept, or        none               (dropped)
//              for a reason that does not pass
//
// Notices may reach the peer twice: it ignores keys that it does not know.
//
// Runs on: the agent's loop.
class PeerNotices {
 public:
  PeerNotices(const Context &context, PeerLink *link, NoticeQueue *queue)
      : context_(context), link_(link), queue_(queue) {}

  // Sends what is queued, but not earlier than kNoticeInterval after the last send.
  // Connects first if there is no connection.
  void Send();
  // Sends what is queued now. Requires a connection, as do the next two.
  void Flush();
  // Flush in two steps, for requests that must be sent between them.
  Notices SendOwned();
  void SendFreed(Notices notices);

  void OnPong(uint64_t ping);
  void OnConnected() { unreachable_since_.reset(); }
  void OnUnreachable(const Status &why);
  void OnLost(PeerLink::Loss loss);

  bool is_empty() const { return queue_->is_empty(); }
  bool has_unconfirmed() const { return !unconfirmed_.empty(); }
  // True if notices are queued and it is time to connect for them.
  bool is_retry_due() const;

 private:
  void SendKeys(FrameType type, std::vector<Key> keys);
  void DropAll();

  const Context context_;
  PeerLink *const link_;
  NoticeQueue *const queue_;
  std::map<uint64_t, Notices> unconfirmed_;  // by the PING that followed them
  uint64_t last_ping_ = 0;
  Clock::time_point sent_at_;
  std::optional<Clock::time_point> unreachable_since_;
  Clock::time_point retry_at_;
  // Tells a timer whether this object still exists.
  const std::shared_ptr<PeerNotices *> alive_ = std::make_shared<PeerNotices *>(this);
};

}  // namespace ray::rdt
