// The seam between a peer and what moves its bytes.
#pragma once

#include <functional>
#include <memory>

#include "ray/rdt/pull.h"
#include "ray/rdt/status.h"
#include "ray/rdt/wire.h"

namespace ray::rdt {

// Tells how a started pull went: ok once the destination is whole, kRefused
// when this lane cannot do it but another may. Called exactly once, on any
// thread, when the lane is done with the pull; not at all if the pull ended by
// itself (cancelled, peer lost).
using Report = std::function<void(const Status &status)>;

// The consumer's half of one lane to one peer. Runs on: the agent's loop.
class Lane {
 public:
  virtual ~Lane() = default;

  // True if the consumer reads the producer's memory itself: the grant must say
  // where it lies, and what was read counts only if the producer still lives.
  virtual bool reads_memory() const { return false; }
  // Never blocks. The producer keeps the region pinned until the report.
  virtual void Start(std::shared_ptr<Pull> pull, const Grant &grant, Report report) = 0;
  // A frame that this lane's other half sent over the control connection.
  virtual void OnFrame(const FrameHeader & /*header*/, ByteView /*payload*/) {}
};

}  // namespace ray::rdt
