// One attempt to connect to another agent and authenticate.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "ray/rdt/address.h"
#include "ray/rdt/auth.h"
#include "ray/rdt/channel.h"

namespace ray::rdt {

// Options of a connection, besides the address.
struct ConnectOptions {
  Purpose purpose = Purpose::kControl;
  bool over_unix = false;
  double connect_timeout_s = 10;
  double peer_timeout_s = 30;
};

// Runs on: the loop that it is given. Reports exactly once, never from the constructor.
// Destroying the object before the report cancels the attempt.
class Connector : private Channel::Handler {
 public:
  // On failure `channel` is empty.
  using OnResult = std::function<void(
      const Status &status, std::shared_ptr<Channel> channel, const PeerInfo &peer)>;

  Connector(Loop *loop,
            const Identity &self,
            const Address &address,
            const ConnectOptions &options,
            OnResult on_result);
  ~Connector() override;

 private:
  void Connect();
  void OnWritable();
  void StartHandshake();
  Handshake NewHandshake() const;
  void OnFrame(const FrameHeader &header, ByteView payload, Fd *attached) override;
  void OnClosed(const Status &why) override;
  void Finish(Status status);

  Loop *const loop_;
  const Identity self_;
  const Address address_;
  const ConnectOptions options_;
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
