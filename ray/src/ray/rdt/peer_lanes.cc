#include "ray/rdt/peer_lanes.h"

#include <string>
#include <utility>

#include "ray/rdt/lanes/cma.h"
#include "ray/rdt/lanes/shm.h"
#include "ray/rdt/lanes/tcp.h"

namespace ray::rdt {

PeerLanes::PeerLanes(const Context &context, const PeerLink *link, LaneReport *report)
    : context_(context), link_(link), report_(report) {}

void PeerLanes::Open() {
  bool is_unix = link_->is_unix();
  std::string no_tcp_reason = link_->NoTcpReason();
  LaneReasons reasons = EvaluateLanes(
      {.mine = context_.settings->lanes,
       .theirs = link_->info().lanes,
       .is_unix = is_unix,
       .cma_probe_error = is_unix ? ProbeCma(link_->pid(), link_->info()) : "",
       .has_tcp = no_tcp_reason.empty(),
       .no_tcp_reason = no_tcp_reason});
  for (LaneKind kind : UsableLanes(reasons)) {
    lanes_[static_cast<size_t>(kind)] = MakeLane(kind);
  }
  report_->Set(reasons);
  LogOnce(reasons);
}

void PeerLanes::Close() {
  for (auto &lane : lanes_) lane.reset();
}

Lane *PeerLanes::Best(LaneSet excluded, LaneKind *kind) const {
  for (size_t i = 0; i < kLaneCount; ++i) {
    *kind = static_cast<LaneKind>(i);
    if (lanes_[i] && !HasLane(excluded, *kind)) return lanes_[i].get();
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
  std::string text = "RDT with " + link_->address().Describe() + ": ";
  text += Best(0, &best) != nullptr ? std::string("lane ") + LaneName(best) : "no lane";
  for (size_t i = 0; i < kLaneCount && reasons[i] != "ok"; ++i) {
    text += std::string(i == 0 ? " (" : "; ") + kLaneNames[i] + ": " + reasons[i];
  }
  context_.log->Info("lanes", text + (reasons[0] != "ok" ? ")" : ""));
}

std::unique_ptr<Lane> PeerLanes::MakeLane(LaneKind kind) const {
  switch (kind) {
  case LaneKind::kCma:
    return std::make_unique<CmaLane>(context_.copies, link_->pid());
  case LaneKind::kShm:
    return std::make_unique<ShmLane>(context_.loop, context_.copies, link_->channel());
  case LaneKind::kTcp:
    return std::make_unique<TcpLane>(
        context_.loop,
        context_.copies,
        *context_.identity,
        link_->address(),
        TcpOptions{.max_streams = context_.settings->tcp_streams,
                   .connect_timeout_s = context_.settings->connect_timeout_s,
                   .peer_timeout_s = context_.settings->peer_timeout_s});
  case LaneKind::kInproc:
    break;
  }
  return nullptr;  // a remote peer is never this process
}

}  // namespace ray::rdt
