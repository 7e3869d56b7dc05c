// Listens for other agents and passes on the connections that are authenticated.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <utility>

#include "ray/rdt/channel.h"
#include "ray/rdt/context.h"

namespace ray::rdt {

// Runs on: the loop that it is given (or before that starts).
class Acceptor {
 public:
  using OnAuthenticated = std::function<void(std::shared_ptr<Channel>, const PeerInfo &)>;

  Acceptor(const Context &context, OnAuthenticated on_authenticated);
  ~Acceptor();

  void ListenOn(Fd listener, bool is_unix);

 private:
  class PendingConnection;

  struct Listener {
    Fd fd;
    bool is_unix;
    Loop::Id watch = 0;
    std::list<std::unique_ptr<PendingConnection>> pending;  // oldest first
  };

  void Open(Listener *listener);
  void Accept(Listener *listener);
  void PauseAccepting(Listener *listener, int shortage);
  void OnHandshakeDone(PendingConnection *pending, PeerInfo peer);
  void Drop(PendingConnection *pending, const Status &why);
  void Remove(PendingConnection *pending);

  const Context context_;
  const OnAuthenticated on_authenticated_;
  std::list<Listener> listeners_;
  std::list<Loop::Id> pauses_;
};

}  // namespace ray::rdt
