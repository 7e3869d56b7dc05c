#include "ray/rdt/connector.h"

#include <sys/epoll.h>

#include <cerrno>

#include "ray/rdt/limits.h"
#include "ray/rdt/net.h"

namespace ray::rdt {

Connector::Connector(Loop *loop,
                     const Identity &self,
                     const Address &address,
                     const ConnectOptions &options,
                     OnResult on_result)
    : loop_(loop),
      self_(self),
      address_(address),
      options_(options),
      handshake_(NewHandshake()),
      on_result_(std::move(on_result)) {
  deadline_ = loop_->After(options_.connect_timeout_s, [this] {
    if (shortage_ != 0) return Finish({Code::kIo, WithErrno("connect", shortage_)});
    Finish({Code::kUnreachable, "no connection within the timeout"});
  });
  retry_ = loop_->After(0, [this] { Connect(); });
}

Connector::~Connector() {
  loop_->CancelTimer(deadline_);
  loop_->CancelTimer(retry_);
  if (connecting_) loop_->Unwatch(watch_);
  if (channel_) channel_->Close();
}

void Connector::Connect() {
  connecting_ = options_.over_unix ? ConnectUnix(address_.agent)
                                   : ConnectTcp(address_.ip, address_.port);
  shortage_ = !connecting_ && IsShortage(errno) ? errno : 0;
  // EAGAIN: the backlog of a Unix socket is full.
  if (!connecting_ && (shortage_ != 0 || errno == EAGAIN)) {
    retry_ = loop_->After(limits::kConnectRetryS, [this] { Connect(); });
    return;
  }
  if (!connecting_) return Finish({Code::kUnreachable, WithErrno("connect", errno)});
  watch_ = loop_->Watch(connecting_.get(), EPOLLOUT, [this](uint32_t) { OnWritable(); });
  if (watch_ != 0) return;
  shortage_ = errno;
  connecting_.Reset();
  retry_ = loop_->After(limits::kConnectRetryS, [this] { Connect(); });
}

void Connector::OnWritable() {
  loop_->Unwatch(watch_);
  int error = SocketError(connecting_.get());
  if (error != 0) return Finish({Code::kUnreachable, WithErrno("connect", error)});
  if (!options_.over_unix) TuneTcp(connecting_.get(), options_.peer_timeout_s);
  StartHandshake();
}

void Connector::StartHandshake() {
  channel_ = std::make_shared<Channel>(loop_, std::move(connecting_));
  channel_->Start(this);
  channel_->Send(handshake_.FirstFrame());
}

Handshake Connector::NewHandshake() const {
  return Handshake::Client(self_, options_.purpose, address_.agent);
}

void Connector::OnFrame(const FrameHeader &header, ByteView payload, Fd *attached) {
  attached->Reset();
  Bytes answer = handshake_.OnFrame(header, payload);
  if (!answer.empty()) channel_->Send(std::move(answer));
  if (handshake_.state() != Handshake::State::kRunning) Finish(handshake_.status());
}

// The network may have broken the connection, or the acceptor may have dropped it in a
// flood. Then a later attempt may succeed; a peer that has exited refuses it.
void Connector::OnClosed(const Status &why) {
  if (++broken_handshakes_ < limits::kMaxHandshakes) {
    channel_.reset();
    handshake_ = NewHandshake();
    retry_ = loop_->After(limits::kConnectRetryS * (1 << (broken_handshakes_ - 1)),
                          [this] { Connect(); });
    return;
  }
  Finish({Code::kUnreachable, "the handshake did not finish: " + why.text});
}

// The callback may destroy this object, so no member is used after it.
void Connector::Finish(Status status) {
  std::shared_ptr<Channel> channel = std::move(channel_);
  OnResult on_result = std::move(on_result_);
  loop_->CancelTimer(deadline_);
  loop_->CancelTimer(retry_);
  if (channel && !status.ok()) {
    channel->Close();
    channel.reset();
  }
  if (channel) channel->set_max_frame(limits::kMaxFrame);
  PeerInfo peer = handshake_.peer();
  on_result(status, std::move(channel), peer);
}

}  // namespace ray::rdt
