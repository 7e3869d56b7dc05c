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
class Acceptor {
 public:
  using OnAuthenticated = std::function<void(std::shared_ptr<Channel>, const PeerInfo &)>;

  // More than this many connections without proof at one listener, and its oldest
  // is dropped: an honest one proves itself in milliseconds, and tries again if it
  // was dropped (see Connector), so a flood keeps nobody out. A flood over TCP is not in
  // the way of the processes of this host.
  static constexpr size_t kMaxUnauthenticated = 64;
  static constexpr double kHandshakeTimeoutS = 5.0;

  Acceptor(Loop *loop, const Identity &self, Log *log, OnAuthenticated on_authenticated);
  ~Acceptor();

  void ListenOn(Fd listener, bool is_unix, double peer_timeout_s);
  size_t unauthenticated() const;

 private:
  class PendingConnection;

  struct Listener {
    Fd fd;
    bool is_unix;
    double peer_timeout_s;
    Loop::Id watch = 0;
    std::list<std::unique_ptr<PendingConnection>> pending;  // oldest first
  };

  // After a failure for want of descriptors or memory: a waiting connection
  // keeps the listener ready, so trying again at once would take all the CPU.
  static constexpr double kPauseS = 0.1;

  void Open(Listener *listener);
  void Accept(Listener *listener);
  void PauseAccepting(Listener *listener, int shortage);
  void OnHandshakeDone(PendingConnection *pending);
  void Drop(PendingConnection *pending, const Status &why);
  void Remove(PendingConnection *pending);

  Loop *const loop_;
  const Identity self_;
  Log *const log_;
  const OnAuthenticated on_authenticated_;
  std::list<Listener> listeners_;
  std::list<Loop::Id> pauses_;
};

}  // namespace ray::rdt
