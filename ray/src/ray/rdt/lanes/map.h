// The producer copies the object once into a file in memory, and each consumer of the
// host maps it in place of its receive buffers. The mapping is private: the first write
// to a page copies it, so no process sees what another one writes.
#pragma once

#include <memory>

#include "ray/rdt/channel.h"
#include "ray/rdt/context.h"
#include "ray/rdt/lanes/lane.h"

namespace ray::rdt {

// Runs on: the agent's loop; maps on a copy thread.
class MapLane : public Lane {
 public:
  MapLane(const Context &context, std::shared_ptr<Channel> channel)
      : context_(context), channel_(std::move(channel)) {}

  PullMode mode() const override { return PullMode::kFile; }
  // True if most of the bytes go to blocks of the receive pool.
  bool Suits(const Pull &pull) const override;
  void Start(std::shared_ptr<Pull> pull,
             const Grant &grant,
             MemoryFiles files,
             Report report) override;

 private:
  const Context context_;
  const std::shared_ptr<Channel> channel_;
};

}  // namespace ray::rdt
