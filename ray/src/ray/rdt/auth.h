// Mutual authentication with the cluster's secret, as a state machine without sockets.
//
// Each side's MAC is HMAC-SHA256(secret, role || HELLO || CHALLENGE || the fields sent
// since). It covers both fresh nonces, both agent ids, the connection's purpose, the
// version and the lane sets. The role prevents the use of one side's MAC as the other's.
// The server sends its MAC only to an authenticated client.
//
// Runs on: any one thread per object.
#pragma once

#include <string>
#include <vector>

#include "ray/rdt/status.h"
#include "ray/rdt/wire.h"

namespace ray::rdt {

void FillRandom(void *to, size_t nbytes);  // getrandom(2); throws if it fails
Mac HmacSha256(const std::string &secret, const std::vector<ByteView> &parts);

// One side's input to every handshake.
struct Identity {
  AgentId agent{};
  std::string secret;
  uint32_t lanes = 0;
  uint64_t probe_address = 0;
  Probe probe{};
};

// The facts about the other side after a finished handshake.
struct PeerInfo {
  AgentId agent{};
  Purpose purpose = Purpose::kControl;
  uint32_t lanes = 0;
  uint64_t probe_address = 0;  // known to the client only
  Probe probe{};
};

class Handshake {
 public:
  enum class State { kRunning, kDone, kFailed };

  // The side that connects. It fails if the server is not `expected`.
  static Handshake Client(const Identity &self, Purpose purpose, const AgentId &expected);
  static Handshake Server(const Identity &self);

  // The client's first frame.
  Bytes FirstFrame();
  // Takes the other side's next frame and returns the frame to send, which may be empty.
  // After kFailed, send it and close the connection.
  Bytes OnFrame(const FrameHeader &header, ByteView payload);

  State state() const { return state_; }
  const Status &status() const { return status_; }
  const PeerInfo &peer() const { return peer_; }

 private:
  explicit Handshake(const Identity &self) : self_(self) {}

  Bytes OnHello(ByteView payload);
  Bytes OnChallenge(ByteView payload);
  Bytes OnProof(ByteView payload);
  Bytes OnWelcome(ByteView payload);
  Bytes Fail(Code code, const std::string &text);
  Bytes OnError(ByteView payload);
  Mac ComputeMac(const char *role, const Bytes &extra) const;

  Identity self_;
  FrameType awaited_ = FrameType::kHello;
  State state_ = State::kRunning;
  Status status_;
  PeerInfo peer_;
  AgentId expected_{};
  Bytes transcript_;  // HELLO and CHALLENGE payloads, which have fixed lengths
};

}  // namespace ray::rdt
