#include "ray/rdt/peer_link.h"

#include <sys/epoll.h>

#include "ray/rdt/lanes/cma.h"
#include "ray/rdt/net.h"

namespace ray::rdt {

void PeerLink::Connect() {
  if (state_ != State::kDisconnected) return;
  if (!is_unix() && !NoTcpReason().empty()) {
    return handler_->OnUnreachable(WithAddress({Code::kRefused, NoTcpReason()}));
  }
  state_ = State::kConnecting;
  connector_ = std::make_unique<Connector>(
      context_,
      address_,
      Purpose::kControl,
      [this](const Status &status,
             std::shared_ptr<Channel> channel,
             const PeerInfo &info) { OnResult(status, std::move(channel), info); });
}

void PeerLink::OnResult(const Status &status,
                        std::shared_ptr<Channel> channel,
                        const PeerInfo &info) {
  connector_.reset();
  if (!status.ok()) {
    state_ = State::kDisconnected;
    return handler_->OnUnreachable(WithAddress(status));
  }
  state_ = State::kConnected;
  channel_ = std::move(channel);
  channel_->set_handler(this);
  info_ = info;
  ++context_.counters->connections;
  last_heard_ = Clock::now();
  if (is_unix()) IdentifyProcess();
  handler_->OnConnected();
}

// The kernel tells which process holds the other end. The pidfd is opened before the
// probe is read, so both are of the same process.
void PeerLink::IdentifyProcess() {
  pid_ = PeerCredentials(channel_->fd()).pid;
  if (pid_ <= 0) return;
  pidfd_ = OpenPidFd(pid_);
  if (!pidfd_) return;
  pidfd_watch_ = context_.loop->Watch(pidfd_.get(), EPOLLIN, [this](uint32_t) {
    Lose("the peer's process exited", Loss::kExited);
  });
}

bool PeerLink::HasExited() const { return pidfd_ && IsReadable(pidfd_.get()); }

// The probe is read again because the process may have called exec in between.
bool PeerLink::IsSameProcess() const {
  return !HasExited() && ProbeCma(pid_, info_).empty() && !IsHungUp(channel_->fd());
}

void PeerLink::Lose(const std::string &why, Loss loss) {
  if (HasExited()) loss = Loss::kExited;
  Close();
  context_.events->Push({.kind = Event::Kind::kLost, .agent = address_.agent});
  handler_->OnLost(WithAddress({Code::kPeerLost, why}), loss);
}

void PeerLink::CheckSilence() {
  if (!handler_->is_waiting()) return;
  double silent_s = std::chrono::duration<double>(Clock::now() - last_heard_).count();
  if (silent_s > context_.settings->peer_timeout_s) {
    std::string seconds = std::to_string(static_cast<int>(silent_s));
    return Lose("the peer has not answered for " + seconds + " s", Loss::kSilent);
  }
  if (silent_s > context_.settings->peer_timeout_s / 3) {
    Send(EncodeFrame(FrameType::kPing, 0));
  }
}

void PeerLink::StartSilenceClock() {
  if (!handler_->is_waiting()) last_heard_ = Clock::now();
}

void PeerLink::Close() {
  state_ = State::kDisconnected;
  connector_.reset();
  if (pidfd_) context_.loop->Unwatch(pidfd_watch_);
  pidfd_.Reset();
  if (!channel_) return;
  channel_->Close();
  channel_.reset();
  --context_.counters->connections;
}

void PeerLink::OnFrame(const FrameHeader &header, ByteView payload, Fds *attached) {
  last_heard_ = Clock::now();
  if (header.version != kProtocolVersion ||
      !handler_->OnPeerFrame(header, payload, attached)) {
    Lose("the peer sent a malformed or unknown frame", Loss::kBroken);
  }
}

std::string PeerLink::NoTcpReason() const {
  if (!context_.settings->clear_tcp) {
    return "TLS is required (RAY_USE_TLS), and RDT's TCP connections are not encrypted: "
           "set RAY_RDT_ALLOW_CLEAR_TCP=1 on all nodes if the network is trusted, or "
           "return the object without a tensor transport, so that Ray sends it over TLS";
  }
  return address_.port == 0 ? "the peer does not listen on TCP" : "";
}

Status PeerLink::WithAddress(const Status &why) const {
  return {why.code, why.text + " (" + address_.Describe() + ")"};
}

}  // namespace ray::rdt
