#include "ray/rdt/acceptor.h"

#include <sys/epoll.h>
#include <unistd.h>

#include <cerrno>

#include "ray/rdt/limits.h"
#include "ray/rdt/net.h"

namespace ray::rdt {

// A connection that is not authenticated.
class Acceptor::PendingConnection : public Channel::Handler {
 public:
  PendingConnection(Acceptor *acceptor,
                    Listener *listener,
                    std::shared_ptr<Channel> channel)
      : listener(listener),
        channel(std::move(channel)),
        acceptor_(acceptor),
        handshake_(Handshake::Server(*acceptor->context_.identity)) {
    deadline_ = acceptor_->context_.loop->After(limits::kHandshakeTimeoutS, [this] {
      acceptor_->Drop(this, {Code::kAuth, "the handshake timed out"});
    });
    this->channel->Start(this);
  }

  ~PendingConnection() override { acceptor_->context_.loop->CancelTimer(deadline_); }

  void OnFrame(const FrameHeader &header, ByteView payload, Fds *attached) override {
    attached->clear();
    Bytes answer = handshake_.OnFrame(header, payload);
    if (!answer.empty()) channel->Send(std::move(answer));
    if (handshake_.state() == Handshake::State::kDone)
      return acceptor_->OnHandshakeDone(this, handshake_.peer());
    if (handshake_.state() == Handshake::State::kFailed)
      acceptor_->Drop(this, handshake_.status());
  }

  void OnClosed(const Status &why) override { acceptor_->Drop(this, why); }

  Listener *const listener;
  const std::shared_ptr<Channel> channel;

 private:
  Acceptor *const acceptor_;
  Handshake handshake_;
  Loop::Id deadline_;
};

Acceptor::Acceptor(const Context &context, OnAuthenticated on_authenticated)
    : context_(context), on_authenticated_(std::move(on_authenticated)) {}

Acceptor::~Acceptor() {
  for (Listener &listener : listeners_) context_.loop->Unwatch(listener.watch);
  for (Loop::Id pause : pauses_) context_.loop->CancelTimer(pause);
}

void Acceptor::ListenOn(Fd listener, bool is_unix) {
  listeners_.push_back({.fd = std::move(listener), .is_unix = is_unix});
  Open(&listeners_.back());
}

void Acceptor::Open(Listener *listener) {
  listener->watch = context_.loop->Watch(
      listener->fd.get(), EPOLLIN, [this, listener](uint32_t) { Accept(listener); });
  if (listener->watch == 0) PauseAccepting(listener, errno);
}

void Acceptor::Accept(Listener *listener) {
  Fd fd = AcceptOne(listener->fd.get());
  if (!fd) {
    if (IsShortage(errno)) PauseAccepting(listener, errno);
    return;  // otherwise the client has closed the connection
  }
  if (listener->is_unix && PeerCredentials(fd.get()).uid != geteuid()) {
    return context_.log->Warning("acceptor",
                                 "RDT refused a connection from another user");
  }
  if (!listener->is_unix) TuneTcp(fd.get(), context_.settings->peer_timeout_s);
  auto &pending = listener->pending;
  if (pending.size() == limits::kMaxUnauthenticated) {
    Drop(pending.front().get(), {Code::kRefused, "too many unauthenticated connections"});
  }
  auto channel = std::make_shared<Channel>(context_.loop, std::move(fd));
  pending.push_back(
      std::make_unique<PendingConnection>(this, listener, std::move(channel)));
}

void Acceptor::PauseAccepting(Listener *listener, int shortage) {
  context_.log->Warning(
      "acceptor", WithErrno("RDT cannot accept connections at the moment", shortage));
  context_.loop->Unwatch(listener->watch);
  pauses_.push_back(context_.loop->After(limits::kAcceptPauseS, [this, listener] {
    pauses_.pop_front();
    Open(listener);
  }));
}

void Acceptor::OnHandshakeDone(PendingConnection *pending, PeerInfo peer) {
  std::shared_ptr<Channel> channel = pending->channel;
  Remove(pending);
  channel->set_max_frame(limits::kMaxFrame);
  on_authenticated_(std::move(channel), peer);
}

void Acceptor::Drop(PendingConnection *pending, const Status &why) {
  context_.log->Warning("acceptor", "RDT dropped an incoming connection: " + why.text);
  pending->channel->Close();
  Remove(pending);
}

void Acceptor::Remove(PendingConnection *pending) {
  pending->listener->pending.remove_if(
      [pending](const auto &one) { return one.get() == pending; });
}

}  // namespace ray::rdt
