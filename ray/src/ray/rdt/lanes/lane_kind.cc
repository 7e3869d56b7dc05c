#include "ray/rdt/lanes/lane_kind.h"

namespace ray::rdt {
namespace {

// The reason why `lane` cannot be used, or "ok".
std::string UnavailableReason(LaneKind lane, const LaneInputs &inputs) {
  switch (lane) {
  case LaneKind::kInproc:
    return inputs.is_same_agent ? "ok" : "the peer is another process";
  case LaneKind::kCma:
    if (!inputs.is_unix) return "the peer is on another host or network namespace";
    return inputs.cma_probe_error.empty() ? "ok" : inputs.cma_probe_error;
  case LaneKind::kShm:
    return inputs.is_unix ? "ok" : "the peer is on another host or network namespace";
  case LaneKind::kTcp:
    return inputs.has_tcp ? "ok" : inputs.no_tcp_reason;
  }
  return "unknown lane";
}

}  // namespace

LaneReasons EvaluateLanes(const LaneInputs &inputs) {
  LaneReasons reasons;
  for (size_t i = 0; i < kLaneCount; ++i) {
    LaneKind lane = static_cast<LaneKind>(i);
    if (!HasLane(inputs.mine, lane)) {
      reasons[i] = "forbidden by this process's settings";
    } else if (!HasLane(inputs.theirs, lane)) {
      reasons[i] = "forbidden by the peer's settings";
    } else {
      reasons[i] = UnavailableReason(lane, inputs);
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
