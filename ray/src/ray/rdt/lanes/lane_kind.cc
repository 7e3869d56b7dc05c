#include "ray/rdt/lanes/lane_kind.h"

namespace ray::rdt {
namespace {

// What rules out `lane` for this pair, or "ok".
std::string Obstacle(LaneKind lane, const LaneFacts &facts) {
  switch (lane) {
  case LaneKind::kInproc:
    return facts.is_same_agent ? "ok" : "the peer is another process";
  case LaneKind::kCma:
    if (!facts.is_unix) return "the peer is on another host or network namespace";
    return facts.cma_probe_error.empty() ? "ok" : facts.cma_probe_error;
  case LaneKind::kShm:
    return facts.is_unix ? "ok" : "the peer is on another host or network namespace";
  case LaneKind::kTcp:
    return facts.has_tcp ? "ok" : facts.no_tcp_reason;
  }
  return "unknown lane";
}

}  // namespace

LaneReasons JudgeLanes(const LaneFacts &facts) {
  LaneReasons reasons;
  for (size_t i = 0; i < kLaneCount; ++i) {
    LaneKind lane = static_cast<LaneKind>(i);
    if (!HasLane(facts.mine, lane)) {
      reasons[i] = "forbidden by this process's settings";
    } else if (!HasLane(facts.theirs, lane)) {
      reasons[i] = "forbidden by the peer's settings";
    } else {
      reasons[i] = Obstacle(lane, facts);
    }
  }
  return reasons;
}

std::vector<LaneKind> UsableLanes(const LaneReasons &reasons) {
  std::vector<LaneKind> usable;
  for (size_t i = 0; i < kLaneCount; ++i) {
    if (reasons[i] == "ok") usable.push_back(static_cast<LaneKind>(i));
  }
  return usable;
}

}  // namespace ray::rdt
