// Lets other agents in: listens, and hands on only those that proved the secret.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <string>

#include "ray/rdt/auth.h"
#include "ray/rdt/channel.h"
#include "ray/rdt/events.h"

namespace ray::rdt {

// Runs on: the loop it was made with (or before that starts).
class Door {
 public:
  using OnEntered = std::function<void(std::shared_ptr<Channel>, const PeerFacts &)>;

  // More than this many connections without proof at one listener, and its oldest
  // is dropped: an honest one proves itself in milliseconds, and tries again if it
  // was dropped (see Dial), so a flood keeps nobody out. A flood over TCP is not in
  // the way of the processes of this host.
  static constexpr size_t kMaxUnproved = 64;
  static constexpr double kProofDeadlineS = 5.0;

  Door(Loop *loop, const Identity &self, Log *log, OnEntered on_entered);
  ~Door();

  void ListenOn(Fd listener, bool is_unix, double peer_timeout_s);
  size_t unproved() const;

 private:
  class Knock;

  struct Listener {
    Fd fd;
    bool is_unix;
    double peer_timeout_s;
    Loop::Id watch = 0;
    std::list<std::unique_ptr<Knock>> knocks;  // oldest first
  };

  // After a failure for want of descriptors or memory: a waiting connection
  // keeps the listener ready, so trying again at once would take all the CPU.
  static constexpr double kPauseS = 0.1;

  void Open(Listener *listener);
  void Accept(Listener *listener);
  void RestFrom(Listener *listener, int shortage);
  void Enter(Knock *knock);
  void Drop(Knock *knock, const Status &why);
  void Remove(Knock *knock);

  Loop *const loop_;
  const Identity self_;
  Log *const log_;
  const OnEntered on_entered_;
  std::list<Listener> listeners_;
  std::list<Loop::Id> pauses_;
};

}  // namespace ray::rdt
