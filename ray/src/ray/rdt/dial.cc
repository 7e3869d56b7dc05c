#include "ray/rdt/dial.h"

#include <sys/epoll.h>

#include <cerrno>

#include "ray/rdt/net.h"

namespace ray::rdt {
namespace {

// A Unix socket whose backlog is full says EAGAIN and tells nobody when it has room.
constexpr double kRetryS = 0.01;

}  // namespace

Dial::Dial(Loop *loop,
           const Identity &self,
           const Address &address,
           const DialOptions &options,
           OnResult on_result)
    : loop_(loop),
      address_(address),
      options_(options),
      handshake_(Handshake::Client(self, options.purpose, address.agent)),
      on_result_(std::move(on_result)) {
  deadline_ = loop_->After(options_.connect_timeout_s, [this] {
    Finish({Code::kUnreachable, "no connection within the timeout"});
  });
  retry_ = loop_->After(0, [this] { Connect(); });
}

Dial::~Dial() {
  loop_->CancelTimer(deadline_);
  loop_->CancelTimer(retry_);
  if (connecting_) loop_->Unwatch(watch_);
  if (channel_) channel_->Close();
}

void Dial::Connect() {
  connecting_ =
      options_.over_unix ? DialUnix(address_.agent) : DialTcp(address_.ip, address_.port);
  if (!connecting_ && errno == EAGAIN) {
    retry_ = loop_->After(kRetryS, [this] { Connect(); });
    return;
  }
  if (!connecting_) return Finish({Code::kUnreachable, WithErrno("connect", errno)});
  watch_ = loop_->Watch(connecting_.get(), EPOLLOUT, [this](uint32_t) { OnWritable(); });
}

void Dial::OnWritable() {
  loop_->Unwatch(watch_);
  int error = SocketError(connecting_.get());
  if (error != 0) return Finish({Code::kUnreachable, WithErrno("connect", error)});
  if (!options_.over_unix) TuneTcp(connecting_.get(), options_.peer_timeout_s);
  Greet();
}

void Dial::Greet() {
  channel_ = std::make_shared<Channel>(loop_, std::move(connecting_));
  channel_->Start(this);
  channel_->Send(handshake_.FirstFrame());
}

void Dial::OnFrame(const FrameHeader &header, ByteView payload, Fd *attached) {
  attached->Reset();
  Bytes answer = handshake_.OnFrame(header, payload);
  if (!answer.empty()) channel_->Send(std::move(answer));
  if (handshake_.state() != Handshake::State::kRunning) Finish(handshake_.status());
}

void Dial::OnClosed(const Status &why) {
  Finish({Code::kUnreachable, "the handshake did not finish: " + why.text});
}

// The callback may drop this object, so nothing of it is used from the call on.
void Dial::Finish(Status status) {
  std::shared_ptr<Channel> channel = std::move(channel_);
  OnResult on_result = std::move(on_result_);
  loop_->CancelTimer(deadline_);
  loop_->CancelTimer(retry_);
  if (channel && !status.ok()) {
    channel->Close();
    channel.reset();
  }
  if (channel) channel->set_max_frame(kMaxFrame);
  PeerFacts peer = handshake_.peer();
  on_result(status, std::move(channel), peer);
}

}  // namespace ray::rdt
