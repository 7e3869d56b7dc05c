#include "ray/rdt/lanes/lane_kind.h"

namespace ray::rdt {
namespace {

// The reason why `lane` cannot be used. Empty if it can.
std::string UnavailableReason(LaneKind lane, const LaneInputs &inputs) {
  if (!HasLane(inputs.mine, lane)) return "forbidden by this process's settings";
  if (!HasLane(inputs.theirs, lane)) return "forbidden by the peer's settings";
  if (lane == LaneKind::kInproc)
    return inputs.is_same_agent ? "" : "the peer is another process";
  if (lane == LaneKind::kTcp) return inputs.no_tcp_reason;
  if (!inputs.is_unix) return "the peer is on another host or network namespace";
  return lane == LaneKind::kCma ? inputs.cma_probe_error : "";
}

}  // namespace

LaneReasons EvaluateLanes(const LaneInputs &inputs) {
  LaneReasons reasons;
  for (size_t i = 0; i < kLaneCount; ++i) {
    reasons[i] = UnavailableReason(static_cast<LaneKind>(i), inputs);
    if (reasons[i].empty()) reasons[i] = "ok";
  }
  return reasons;
}

}  // namespace ray::rdt
