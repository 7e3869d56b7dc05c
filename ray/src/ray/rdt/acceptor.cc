#include "ray/rdt/acceptor.h"

#include <sys/epoll.h>
#include <unistd.h>

#include <cerrno>

#include "ray/rdt/net.h"

namespace ray::rdt {

// One connection that has not proved itself.
class Door::Knock : public Channel::Handler {
 public:
  Knock(Door *door, Listener *listener, std::shared_ptr<Channel> channel)
      : door_(door),
        listener_(listener),
        channel_(std::move(channel)),
        handshake_(Handshake::Server(door->self_)) {
    deadline_ = door_->loop_->After(kProofDeadlineS, [this] {
      door_->Drop(this, {Code::kAuth, "no proof came in time"});
    });
    channel_->Start(this);
  }

  ~Knock() override { door_->loop_->CancelTimer(deadline_); }

  void OnFrame(const FrameHeader &header, ByteView payload, Fd *attached) override {
    attached->Reset();
    Bytes answer = handshake_.OnFrame(header, payload);
    if (!answer.empty()) channel_->Send(std::move(answer));
    if (handshake_.state() == Handshake::State::kDone) return door_->Enter(this);
    if (handshake_.state() == Handshake::State::kFailed)
      door_->Drop(this, handshake_.status());
  }

  void OnClosed(const Status &why) override { door_->Drop(this, why); }

  Listener *listener() const { return listener_; }
  std::shared_ptr<Channel> channel() const { return channel_; }
  const PeerFacts &peer() const { return handshake_.peer(); }

 private:
  Door *const door_;
  Listener *const listener_;
  const std::shared_ptr<Channel> channel_;
  Handshake handshake_;
  Loop::Id deadline_;
};

Door::Door(Loop *loop, const Identity &self, Log *log, OnEntered on_entered)
    : loop_(loop), self_(self), log_(log), on_entered_(std::move(on_entered)) {}

Door::~Door() {
  for (Listener &listener : listeners_) loop_->Unwatch(listener.watch);
  for (Loop::Id pause : pauses_) loop_->CancelTimer(pause);
}

void Door::ListenOn(Fd listener, bool is_unix, double peer_timeout_s) {
  listeners_.push_back(
      {.fd = std::move(listener), .is_unix = is_unix, .peer_timeout_s = peer_timeout_s});
  Open(&listeners_.back());
}

void Door::Open(Listener *listener) {
  listener->watch = loop_->Watch(
      listener->fd.get(), EPOLLIN, [this, listener](uint32_t) { Accept(listener); });
  if (listener->watch == 0) RestFrom(listener, errno);
}

void Door::Accept(Listener *listener) {
  Fd fd = AcceptOne(listener->fd.get());
  if (!fd) {
    if (IsShortage(errno)) RestFrom(listener, errno);
    return;  // else the other side went away again
  }
  if (listener->is_unix && PeerCredentials(fd.get()).uid != geteuid()) {
    return log_->Warning("door", "RDT refused a connection from another user");
  }
  if (!listener->is_unix) TuneTcp(fd.get(), listener->peer_timeout_s);
  auto &knocks = listener->knocks;
  if (knocks.size() == kMaxUnproved) {
    Drop(knocks.front().get(), {Code::kRefused, "too many connections without proof"});
  }
  auto channel = std::make_shared<Channel>(loop_, std::move(fd));
  knocks.push_back(std::make_unique<Knock>(this, listener, std::move(channel)));
}

size_t Door::unproved() const {
  size_t count = 0;
  for (const Listener &listener : listeners_) count += listener.knocks.size();
  return count;
}

void Door::RestFrom(Listener *listener, int shortage) {
  log_->Warning("door", WithErrno("RDT cannot take connections for now", shortage));
  loop_->Unwatch(listener->watch);
  pauses_.push_back(loop_->After(kPauseS, [this, listener] {
    pauses_.pop_front();
    Open(listener);
  }));
}

void Door::Enter(Knock *knock) {
  std::shared_ptr<Channel> channel = knock->channel();
  PeerFacts peer = knock->peer();
  Remove(knock);
  channel->set_max_frame(kMaxFrame);
  on_entered_(std::move(channel), peer);
}

void Door::Drop(Knock *knock, const Status &why) {
  log_->Warning("door", "RDT dropped an incoming connection: " + why.text);
  knock->channel()->Close();
  Remove(knock);
}

void Door::Remove(Knock *knock) {
  knock->listener()->knocks.remove_if(
      [knock](const auto &one) { return one.get() == knock; });
}

}  // namespace ray::rdt
