#include "ray/rdt/remote_peer.h"

#include <utility>

namespace ray::rdt {

RemotePeer::RemotePeer(const Context &context, const Address &address)
    : link_(context, address, this),
      lanes_(context, &link_, &lane_report_),
      notices_(context, &link_, &notice_queue_),
      calls_(&link_, &notices_),
      pulls_(context, &link_, &lanes_) {}

void RemotePeer::Submit(std::shared_ptr<Pull> pull) {
  pulls_.Add(std::move(pull));
  link_.Connect();
}

void RemotePeer::Submit(std::shared_ptr<Call> call, Bytes payload) {
  calls_.Add(std::move(call), std::move(payload));
  link_.Connect();
}

void RemotePeer::Tick() {
  if (link_.is_connected()) return link_.CheckSilence();
  if (notices_.is_retry_due()) link_.Connect();
}

bool RemotePeer::is_idle() const {
  return link_.state() == PeerLink::State::kDisconnected && !is_waiting() &&
         notices_.is_empty();
}

bool RemotePeer::is_waiting() const {
  return !pulls_.is_empty() || !calls_.is_empty() || notices_.has_unconfirmed();
}

void RemotePeer::Shutdown(const Status &why) {
  if (link_.is_connected()) notices_.Flush();
  link_.Close();
  lanes_.Close();
  FailAll(why);
}

void RemotePeer::OnConnected() {
  notices_.OnConnected();
  lanes_.Open();
  calls_.FailUncertain();
  // Ownership is told before calls that refer to it, frees after pulls made before them.
  Notices notices = notices_.SendOwned();
  calls_.SendAll();
  pulls_.SendAll();
  notices_.SendFreed(std::move(notices));
}

void RemotePeer::OnUnreachable(const Status &why) {
  FailAll(why);
  notices_.OnUnreachable(why);
}

// Notices alone do not reconnect at once: they wait for the next Tick.
void RemotePeer::OnLost(const Status &why, PeerLink::Loss loss) {
  lanes_.Close();
  notices_.OnLost(loss);
  pulls_.OnLost(why, loss);
  calls_.OnLost(why, loss);
  if (!pulls_.is_empty() || !calls_.is_empty()) link_.Connect();
}

bool RemotePeer::OnPeerFrame(const FrameHeader &header, ByteView payload, Fds *attached) {
  switch (header.type) {
  case FrameType::kGrant:
    return pulls_.OnGrant(header.request, Unpack<Grant>(payload));
  case FrameType::kFile:
    return pulls_.OnFile(header.request, Unpack<File>(payload), attached);
  case FrameType::kRefuse:
    return pulls_.OnRefuse(header.request, Unpack<Refuse>(payload));
  case FrameType::kReply:
    return calls_.OnReply(header.request, payload);
  case FrameType::kFilled:
    if (Lane *shm = lanes_.Find(LaneKind::kShm)) shm->OnFrame(header, payload);
    return true;
  case FrameType::kPong:
    notices_.OnPong(header.request);
    return true;
  default:
    return false;
  }
}

void RemotePeer::FailAll(const Status &why) {
  pulls_.FailAll(why);
  calls_.FailAll(why);
}

}  // namespace ray::rdt
