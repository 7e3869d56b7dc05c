// One attempt to reach another agent and prove the secret to it.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "ray/rdt/address.h"
#include "ray/rdt/auth.h"
#include "ray/rdt/channel.h"

namespace ray::rdt {

// How, besides the address, a connection is made.
struct ConnectOptions {
  Purpose purpose = Purpose::kControl;
  bool over_unix = false;
  double connect_timeout_s = 10;
  double peer_timeout_s = 30;
};

// Runs on: the loop it was made with. Reports exactly once, never from inside
// the constructor; dropping the object before that drops the attempt.
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
  int broken_handshakes_ = 0;  // attempts whose handshake was cut off
  int shortage_ = 0;           // why the last attempt had no socket
  Loop::Id watch_ = 0;
  Loop::Id deadline_ = 0;
  Loop::Id retry_ = 0;
  std::shared_ptr<Channel> channel_;
};

}  // namespace ray::rdt
