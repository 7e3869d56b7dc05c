// Numbers for Agent::Stats. Written on any thread.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "ray/rdt/lanes/lane_kind.h"

namespace ray::rdt {

struct LaneCounters {
  std::atomic<uint64_t> pulls{0};     // completed, as consumer
  std::atomic<uint64_t> bytes_in{0};  // of those
};

struct Counters {
  std::atomic<uint64_t> bytes_granted{0};  // as producer, on all lanes
  std::array<LaneCounters, kLaneCount> lanes;
  std::atomic<int64_t> pulls_live{0};  // started here and not settled
  std::atomic<int64_t> calls_live{0};
  std::atomic<int64_t> connections{
      0};  // authenticated control connections, both directions

  void CountPull(LaneKind lane, uint64_t nbytes) {
    ++lanes[static_cast<size_t>(lane)].pulls;
    lanes[static_cast<size_t>(lane)].bytes_in += nbytes;
  }
};

}  // namespace ray::rdt
