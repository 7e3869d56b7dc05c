// Shared-memory lane, for hosts that forbid cma. The consumer owns a ring of slots in a
// memfd. For each slot, FILL asks the producer to copy a range into it, FILLED confirms
// that, and the consumer copies the range out.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "ray/rdt/channel.h"
#include "ray/rdt/copy_pool.h"
#include "ray/rdt/lanes/lane.h"
#include "ray/rdt/lanes/ring.h"
#include "ray/rdt/limits.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// The consumer's half. Runs on: the agent's loop; copies on the copy threads.
class ShmLane : public Lane {
 public:
  ShmLane(Loop *loop, CopyPool *copies, std::shared_ptr<Channel> channel)
      : loop_(loop), copies_(copies), channel_(std::move(channel)) {}

  void Start(std::shared_ptr<Pull> pull,
             const Grant &grant,
             MemoryFiles files,
             Report report) override;
  void OnFrame(const FrameHeader &header, ByteView payload) override;

 private:
  struct Slot {
    std::shared_ptr<LaneJob> job;  // empty: free
    Range range;
    bool is_filled = false;
  };

  bool OpenRing();
  void Pump();
  void CopySlot(size_t index);
  void OnSlotCopied(size_t index, bool is_whole);

  Loop *const loop_;
  CopyPool *const copies_;
  const std::shared_ptr<Channel> channel_;
  std::shared_ptr<RingMemory> ring_;
  Status refusal_;  // permanent: the peer disables the lane after the report
  std::vector<Slot> slots_{limits::kSlots};
  std::deque<std::shared_ptr<LaneJob>> jobs_;  // with bytes left to request; in turns
  // Tells a copy step whether the lane still exists.
  const std::shared_ptr<ShmLane *> alive_ = std::make_shared<ShmLane *>(this);
};

// The producer's half, one for each control connection.
// Runs on: the agent's loop; copies on the copy threads.
class ShmSource {
 public:
  ShmSource(Loop *loop, CopyPool *copies, std::shared_ptr<Channel> channel)
      : loop_(loop), copies_(copies), channel_(std::move(channel)) {}

  // False if the frame is malformed or the descriptor is not a ring.
  bool OnRing(const std::optional<Ring> &ring, Fd fd);
  // False if the frame is malformed, or exceeds the ring or the region. For a pull that
  // has ended (`pin` is empty) FILLED reports a failure.
  bool OnFill(uint64_t pull, const std::optional<Fill> &frame, Pin pin);

 private:
  Loop *const loop_;
  CopyPool *const copies_;
  const std::shared_ptr<Channel> channel_;
  std::shared_ptr<MemoryFile> ring_;
};

}  // namespace ray::rdt
