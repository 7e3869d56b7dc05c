// The interface between a peer and the code that transfers its bytes.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <utility>

#include "ray/rdt/memory_file.h"
#include "ray/rdt/pull.h"
#include "ray/rdt/status.h"
#include "ray/rdt/wire.h"

namespace ray::rdt {

// Reports the result of a started pull: ok once the destination is complete, kRefused if
// another lane may succeed. Called exactly once, on any thread, when the lane has
// finished with the pull. Not called if the pull has ended (cancelled, peer lost).
using Report = std::function<void(const Status &status)>;

// A pull on a lane. Runs on: any thread.
class LaneJob {
 public:
  LaneJob(std::shared_ptr<Pull> pull, Report report, uint64_t chunk)
      : pull(std::move(pull)),
        attempt(this->pull->attempt()),
        report_(std::move(report)),
        chunk_(chunk) {}

  // Takes a chunk. False if none is left.
  bool TakeRange(Range *range) { return pull->TakeRange(attempt, chunk_, range); }
  // Only the first result counts.
  void ReportOnce(const Status &status) {
    if (!is_reported_.exchange(true)) report_(status);
  }

  const std::shared_ptr<Pull> pull;
  const uint64_t attempt;

 private:
  const Report report_;
  const uint64_t chunk_;
  std::atomic<bool> is_reported_{false};
};

// The consumer's half of one lane to one peer. Runs on: the agent's loop.
class Lane {
 public:
  virtual ~Lane() = default;

  // With kSpans the bytes are valid only if the producer is still alive afterwards.
  virtual PullMode mode() const { return PullMode::kStream; }
  // True if the lane suits the destination.
  virtual bool Suits(const Pull & /*pull*/) const { return true; }
  // Does not block. The producer keeps the region pinned until the report.
  // `files` came with the grant.
  virtual void Start(std::shared_ptr<Pull> pull,
                     const Grant &grant,
                     MemoryFiles files,
                     Report report) = 0;
  // Takes a frame that this lane's producer half sent over the control connection.
  virtual void OnFrame(const FrameHeader & /*header*/, ByteView /*payload*/) {}
};

}  // namespace ray::rdt
