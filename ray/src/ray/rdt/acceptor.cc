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
      : acceptor_(acceptor),
        listener_(listener),
        channel_(std::move(channel)),
        handshake_(Handshake::Server(acceptor->self_)) {
    deadline_ = acceptor_->loop_->After(limits::kHandshakeTimeoutS, [this] {
      acceptor_->Drop(this, {Code::kAuth, "the handshake timed out"});
    });
    channel_->Start(this);
  }

  ~PendingConnection() override { acceptor_->loop_->CancelTimer(deadline_); }

  void OnFrame(const FrameHeader &header, ByteView payload, Fd *attached) override {
    attached->Reset();
    Bytes answer = handshake_.OnFrame(header, payload);
    if (!answer.empty()) channel_->Send(std::move(answer));
    if (handshake_.state() == Handshake::State::kDone)
      return acceptor_->OnHandshakeDone(this);
    if (handshake_.state() == Handshake::State::kFailed)
      acceptor_->Drop(this, handshake_.status());
  }

  void OnClosed(const Status &why) override { acceptor_->Drop(this, why); }

  Listener *listener() const { return listener_; }
  std::shared_ptr<Channel> channel() const { return channel_; }
  const PeerInfo &peer() const { return handshake_.peer(); }

 private:
  Acceptor *const acceptor_;
  Listener *const listener_;
  const std::shared_ptr<Channel> channel_;
  Handshake handshake_;
  Loop::Id deadline_;
};

Acceptor::Acceptor(Loop *loop,
                   const Identity &self,
                   Log *log,
                   OnAuthenticated on_authenticated)
    : loop_(loop),
      self_(self),
      log_(log),
      on_authenticated_(std::move(on_authenticated)) {}

Acceptor::~Acceptor() {
  for (Listener &listener : listeners_) loop_->Unwatch(listener.watch);
  for (Loop::Id pause : pauses_) loop_->CancelTimer(pause);
}

void Acceptor::ListenOn(Fd listener, bool is_unix, double peer_timeout_s) {
  listeners_.push_back(
      {.fd = std::move(listener), .is_unix = is_unix, .peer_timeout_s = peer_timeout_s});
  Open(&listeners_.back());
}

void Acceptor::Open(Listener *listener) {
  listener->watch = loop_->Watch(
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
    return log_->Warning("acceptor", "RDT refused a connection from another user");
  }
  if (!listener->is_unix) TuneTcp(fd.get(), listener->peer_timeout_s);
  auto &pending = listener->pending;
  if (pending.size() == limits::kMaxUnauthenticated) {
    Drop(pending.front().get(), {Code::kRefused, "too many unauthenticated connections"});
  }
  auto channel = std::make_shared<Channel>(loop_, std::move(fd));
  pending.push_back(
      std::make_unique<PendingConnection>(this, listener, std::move(channel)));
}

size_t Acceptor::unauthenticated() const {
  size_t count = 0;
  for (const Listener &listener : listeners_) count += listener.pending.size();
  return count;
}

void Acceptor::PauseAccepting(Listener *listener, int shortage) {
  log_->Warning("acceptor",
                WithErrno("RDT cannot accept connections at the moment", shortage));
  loop_->Unwatch(listener->watch);
  pauses_.push_back(loop_->After(limits::kAcceptPauseS, [this, listener] {
    pauses_.pop_front();
    Open(listener);
  }));
}

void Acceptor::OnHandshakeDone(PendingConnection *pending) {
  std::shared_ptr<Channel> channel = pending->channel();
  PeerInfo peer = pending->peer();
  Remove(pending);
  channel->set_max_frame(limits::kMaxFrame);
  on_authenticated_(std::move(channel), peer);
}

void Acceptor::Drop(PendingConnection *pending, const Status &why) {
  log_->Warning("acceptor", "RDT dropped an incoming connection: " + why.text);
  pending->channel()->Close();
  Remove(pending);
}

void Acceptor::Remove(PendingConnection *pending) {
  pending->listener()->pending.remove_if(
      [pending](const auto &one) { return one.get() == pending; });
}

}  // namespace ray::rdt
