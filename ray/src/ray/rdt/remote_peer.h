// A peer in another process.
#pragma once

#include <memory>

#include "ray/rdt/context.h"
#include "ray/rdt/peer.h"
#include "ray/rdt/peer_calls.h"
#include "ray/rdt/peer_lanes.h"
#include "ray/rdt/peer_link.h"
#include "ray/rdt/peer_notices.h"
#include "ray/rdt/peer_pulls.h"

namespace ray::rdt {

// Orders what its parts do when the connection's state changes; peer_link.h has the
// states of the connection, peer_pulls.h, peer_calls.h and peer_notices.h those of what
// is sent over it.
//
// Runs on: the agent's loop.
class RemotePeer : public Peer, private PeerLink::Handler {
 public:
  RemotePeer(const Context &context, const Address &address);

  void Submit(std::shared_ptr<Pull> pull) override;
  void Submit(std::shared_ptr<Call> call, Bytes payload) override;
  void ForgetPull(uint64_t id) override { pulls_.Forget(id); }
  void ForgetCall(uint64_t id) override { calls_.Forget(id); }
  void SendNotices() override { notices_.Send(); }
  void Tick() override;
  bool is_idle() const override;
  void Shutdown(const Status &why) override;

 private:
  void OnConnected() override;
  void OnUnreachable(const Status &why) override;
  void OnLost(const Status &why, PeerLink::Loss loss) override;
  bool OnPeerFrame(const FrameHeader &header, ByteView payload, Fds *attached) override;
  bool is_waiting() const override;
  void FailAll(const Status &why);

  PeerLink link_;
  PeerLanes lanes_;
  PeerNotices notices_;
  PeerCalls calls_;
  PeerPulls pulls_;
};

}  // namespace ray::rdt
