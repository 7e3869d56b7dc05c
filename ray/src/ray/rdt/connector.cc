#include "ray/rdt/connector.h"

#include <sys/epoll.h>

#include <cerrno>

#include "ray/rdt/limits.h"
#include "ray/rdt/net.h"

namespace ray::rdt {

Connector::Connector(const Context &context,
                     const Address &address,
                     Purpose purpose,
                     OnResult on_result)
    : context_(context),
      address_(address),
      purpose_(purpose),
      is_unix_(purpose == Purpose::kControl && context.self->SharesHostWith(address)),
      handshake_(NewHandshake()),
      on_result_(std::move(on_result)) {
  deadline_ = context_.loop->After(context_.settings->connect_timeout_s, [this] {
    if (shortage_ != 0) return Finish({Code::kIo, WithErrno("connect", shortage_)});
    Finish({Code::kUnreachable, "no connection within the timeout"});
  });
  RetryAfter(0);
}

Connector::~Connector() {
  context_.loop->CancelTimer(deadline_);
  context_.loop->CancelTimer(retry_);
  if (connecting_) context_.loop->Unwatch(watch_);
  if (channel_) channel_->Close();
}

void Connector::RetryAfter(double seconds) {
  retry_ = context_.loop->After(seconds, [this] { Connect(); });
}

void Connector::Connect() {
  connecting_ =
      is_unix_ ? ConnectUnix(address_.agent) : ConnectTcp(address_.ip, address_.port);
  shortage_ = !connecting_ && IsShortage(errno) ? errno : 0;
  // EAGAIN: the backlog of a Unix socket is full.
  if (!connecting_ && (shortage_ != 0 || errno == EAGAIN)) {
    return RetryAfter(limits::kConnectRetryS);
  }
  if (!connecting_) return Finish({Code::kUnreachable, WithErrno("connect", errno)});
  watch_ = context_.loop->Watch(
      connecting_.get(), EPOLLOUT, [this](uint32_t) { OnWritable(); });
  if (watch_ != 0) return;
  shortage_ = errno;
  connecting_.Reset();
  RetryAfter(limits::kConnectRetryS);
}

void Connector::OnWritable() {
  context_.loop->Unwatch(watch_);
  int error = SocketError(connecting_.get());
  if (error != 0) return Finish({Code::kUnreachable, WithErrno("connect", error)});
  if (!is_unix_) TuneTcp(connecting_.get(), context_.settings->peer_timeout_s);
  channel_ = std::make_shared<Channel>(context_.loop, std::move(connecting_));
  channel_->Start(this);
  channel_->Send(handshake_.FirstFrame());
}

Handshake Connector::NewHandshake() const {
  return Handshake::Client(*context_.identity, purpose_, address_.agent);
}

void Connector::OnFrame(const FrameHeader &header, ByteView payload, Fds *attached) {
  attached->clear();
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
    return RetryAfter(limits::kConnectRetryS * (1 << (broken_handshakes_ - 1)));
  }
  Finish({Code::kUnreachable, "the handshake did not finish: " + why.text});
}

// The callback may destroy this object, so no member is used after it.
void Connector::Finish(Status status) {
  std::shared_ptr<Channel> channel = std::move(channel_);
  OnResult on_result = std::move(on_result_);
  context_.loop->CancelTimer(deadline_);
  context_.loop->CancelTimer(retry_);
  if (channel && !status.ok()) {
    channel->Close();
    channel.reset();
  }
  if (channel) channel->set_max_frame(limits::kMaxFrame);
  PeerInfo peer = handshake_.peer();
  on_result(status, std::move(channel), peer);
}

}  // namespace ray::rdt
