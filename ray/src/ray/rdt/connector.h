// One attempt to connect to another agent and authenticate.
#pragma once

#include <functional>
#include <memory>

#include "ray/rdt/channel.h"
#include "ray/rdt/context.h"

namespace ray::rdt {

// Runs on: the loop that it is given. Reports exactly once, never from the constructor.
// Destroying the object before the report cancels the attempt.
class Connector : private Channel::Handler {
 public:
  // On failure `channel` is empty.
  using OnResult = std::function<void(
      const Status &status, std::shared_ptr<Channel> channel, const PeerInfo &peer)>;

  // Control connections to a process of this host use its Unix socket, others TCP.
  Connector(const Context &context,
            const Address &address,
            Purpose purpose,
            OnResult on_result);
  ~Connector() override;

 private:
  void Connect();
  void OnWritable();
  void RetryAfter(double seconds);
  Handshake NewHandshake() const;
  void OnFrame(const FrameHeader &header, ByteView payload, Fds *attached) override;
  void OnClosed(const Status &why) override;
  void Finish(Status status);

  const Context context_;
  const Address address_;
  const Purpose purpose_;
  const bool is_unix_;
  Handshake handshake_;
  OnResult on_result_;
  Fd connecting_;
  int broken_handshakes_ = 0;  // whose connection was closed
  int shortage_ = 0;           // errno if the last attempt had no descriptor or memory
  Loop::Id watch_ = 0;
  Loop::Id deadline_ = 0;
  Loop::Id retry_ = 0;
  std::shared_ptr<Channel> channel_;
};

}  // namespace ray::rdt
