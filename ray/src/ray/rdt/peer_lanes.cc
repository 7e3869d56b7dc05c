#include "ray/rdt/peer_lanes.h"

#include <string>
#include <utility>

#include "ray/rdt/lanes/cma.h"
#include "ray/rdt/lanes/map.h"
#include "ray/rdt/lanes/shm.h"
#include "ray/rdt/lanes/tcp.h"

namespace ray::rdt {

void PeerLanes::Open() {
  bool is_unix = link_->is_unix();
  LaneReasons reasons = EvaluateLanes(
      {.mine = context_.settings->lanes,
       .theirs = link_->info().lanes,
       .is_unix = is_unix,
       .cma_probe_error = is_unix ? ProbeCma(link_->pid(), link_->info()) : "",
       .no_tcp_reason = link_->NoTcpReason()});
  for (size_t i = 0; i < kLaneCount; ++i) {
    if (reasons[i] == "ok") lanes_[i] = MakeLane(static_cast<LaneKind>(i));
  }
  report_->Set(reasons);
  LogOnce(reasons);
}

void PeerLanes::Close() {
  for (auto &lane : lanes_) lane.reset();
}

Lane *PeerLanes::Best(LaneSet excluded, LaneKind *kind, const Pull *pull) const {
  for (size_t i = 0; i < kLaneCount; ++i) {
    *kind = static_cast<LaneKind>(i);
    if (!lanes_[i] || HasLane(excluded, *kind)) continue;
    if (pull == nullptr || lanes_[i]->Suits(*pull)) return lanes_[i].get();
  }
  return nullptr;
}

void PeerLanes::Disable(LaneKind kind, const std::string &why) {
  LaneReasons reasons = report_->Get();
  reasons[static_cast<size_t>(kind)] = why;
  report_->Set(reasons);
  lanes_[static_cast<size_t>(kind)].reset();
  context_.log->Warning("lanes",
                        std::string("RDT no longer uses lane ") + LaneName(kind) +
                            " with " + link_->address().Describe() + ": " + why);
}

void PeerLanes::LogOnce(const LaneReasons &reasons) {
  if (std::exchange(is_logged_, true)) return;
  LaneKind best = LaneKind::kTcp;
  // map carries only some objects.
  bool has_lane = Best(LaneBit(LaneKind::kMap), &best) != nullptr;
  std::string unusable;
  for (size_t i = 0; i < static_cast<size_t>(best); ++i) {
    if (reasons[i] == "ok") continue;
    unusable +=
        std::string(unusable.empty() ? "" : "; ") + kLaneNames[i] + ": " + reasons[i];
  }
  std::string lane = has_lane ? std::string("lane ") + LaneName(best) : "no lane";
  if (!unusable.empty()) lane += " (" + unusable + ")";
  context_.log->Info("lanes", "RDT with " + link_->address().Describe() + ": " + lane);
}

std::unique_ptr<Lane> PeerLanes::MakeLane(LaneKind kind) const {
  if (kind == LaneKind::kMap)
    return std::make_unique<MapLane>(context_, link_->channel());
  if (kind == LaneKind::kCma)
    return std::make_unique<CmaLane>(context_.copies, link_->pid());
  if (kind == LaneKind::kShm)
    return std::make_unique<ShmLane>(context_.loop, context_.copies, link_->channel());
  if (kind == LaneKind::kTcp)
    return std::make_unique<TcpLane>(context_, link_->address());
  return nullptr;  // a remote peer is never this process
}

}  // namespace ray::rdt
