// The producer's half: serves the agents that pull from this process.
#pragma once

#include <functional>
#include <map>
#include <memory>

#include "ray/rdt/channel.h"
#include "ray/rdt/context.h"
#include "ray/rdt/fan_outs.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// Runs on: the agent's loop.
class Service {
 public:
  using Replier = std::function<void(bool is_error, Bytes payload)>;

  Service(const Context &context, RegionTable *regions);
  ~Service();

  // Takes an authenticated connection. One for data moves to a copy thread.
  void AddConnection(std::shared_ptr<Channel> channel, const PeerInfo &peer);

  // Passes a call to the Python code; `reply` runs with its answer.
  void ForwardCall(const AgentId &from, ByteView payload, Replier reply);
  // Computes an object's checksum on the copy threads, unless it is known.
  void FindChecksum(const Key &key, Replier reply);
  void Reply(uint64_t call, bool is_error, Bytes payload);

  const PinTable &pins() const { return *pins_; }
  void Shutdown();

 private:
  class Session;

  void RemoveSession(Session *session);

  const Context context_;
  RegionTable *const regions_;
  const std::shared_ptr<PinTable> pins_ = std::make_shared<PinTable>();
  FanOuts fan_outs_;
  uint64_t next_source_ = 0;
  std::map<Session *, std::unique_ptr<Session>> sessions_;
  uint64_t next_call_ = 1;
  std::map<uint64_t, Replier> repliers_;
};

}  // namespace ray::rdt
