// The lanes over the connection to one peer.
#pragma once

#include <array>
#include <memory>

#include "ray/rdt/context.h"
#include "ray/rdt/lanes/lane.h"
#include "ray/rdt/peer.h"
#include "ray/rdt/peer_link.h"

namespace ray::rdt {

// Runs on: the agent's loop.
class PeerLanes {
 public:
  PeerLanes(const Context &context, const PeerLink *link, LaneReport *report)
      : context_(context), link_(link), report_(report) {}

  // Evaluates which lanes the new connection allows, and logs that once for each peer.
  void Open();
  void Close();
  // Null if that lane cannot be used.
  Lane *Find(LaneKind kind) const { return lanes_[static_cast<size_t>(kind)].get(); }
  // The first usable lane in order of preference that suits the pull. Null if there is
  // none.
  Lane *Best(LaneSet excluded, LaneKind *kind, const Pull *pull = nullptr) const;
  // Excludes a lane until the next connection.
  void Disable(LaneKind kind, const std::string &why);

 private:
  std::unique_ptr<Lane> MakeLane(LaneKind kind) const;
  void LogOnce(const LaneReasons &reasons);

  const Context context_;
  const PeerLink *const link_;
  LaneReport *const report_;
  std::array<std::unique_ptr<Lane>, kLaneCount> lanes_;
  bool is_logged_ = false;
};

}  // namespace ray::rdt
