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

  // More than this many connections without proof, and the oldest is dropped:
  // an honest one proves itself in milliseconds, so a flood delays nobody.
  static constexpr size_t kMaxUnproved = 64;
  static constexpr double kProofDeadlineS = 5.0;

  Door(Loop *loop, const Identity &self, Log *log, OnEntered on_entered);
  ~Door();

  void ListenOn(Fd listener, bool is_unix, double peer_timeout_s);
  size_t unproved() const { return knocks_.size(); }

 private:
  class Knock;

  void Accept(int listener, bool is_unix, double peer_timeout_s);
  void Enter(Knock *knock);
  void Drop(Knock *knock, const Status &why);
  void Remove(Knock *knock);

  Loop *const loop_;
  const Identity self_;
  Log *const log_;
  const OnEntered on_entered_;
  std::list<Fd> listeners_;
  std::list<Loop::Id> watches_;
  std::list<std::unique_ptr<Knock>> knocks_;  // oldest first
};

}  // namespace ray::rdt
