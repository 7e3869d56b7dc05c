// Pulls from one peer.
#pragma once

#include <map>
#include <memory>
#include <optional>

#include "ray/rdt/context.h"
#include "ray/rdt/peer_lanes.h"
#include "ray/rdt/peer_link.h"
#include "ray/rdt/pull.h"

namespace ray::rdt {

// state       event                                     action                next state
// ----------  ----------------------------------------  --------------------  ----------
// kQueued     connected                                 PULL for best lane    kRequested
// kRequested  GRANT with the bytes                      copy them, DONE       (done)
// kRequested  GRANT                                     start the lane        kMoving
// kRequested  REFUSE: the lane cannot carry the object  ABORT, PULL for next  kRequested
// kRequested  REFUSE for another reason                 fail, DONE            (done)
// kMoving     lane finished                             DONE                  (done)
// kMoving     lane failed with kIo, tries left          ABORT, PULL           kRequested
// kMoving     lane failed with kRefused                 disable lane, ABORT,  kRequested
//                                                       PULL for next
// kMoving     lane failed otherwise                     fail, DONE            (done)
// any         no lane left                              fail                  (done)
// any         connection lost, tries left               none                  kQueued
// any         connection lost kMaxTries times with no   fail                  (done)
//             byte in between, or the process exited
// any         cancelled                                 ABORT if sent         (done)
//
// Runs on: the agent's loop.
class PeerPulls {
 public:
  PeerPulls(const Context &context, PeerLink *link, PeerLanes *lanes)
      : context_(context), link_(link), lanes_(lanes) {}

  // Requests the pull if there is a connection.
  void Add(std::shared_ptr<Pull> pull);
  void Forget(uint64_t id);
  void SendAll();
  // False if the frame is malformed or does not answer a PULL.
  bool OnFile(uint64_t id, const std::optional<File> &file, Fds *attached);
  bool OnGrant(uint64_t id, const std::optional<Grant> &grant);
  bool OnRefuse(uint64_t id, const std::optional<Refuse> &refuse);
  void OnLost(const Status &why, PeerLink::Loss loss);
  void FailAll(const Status &why);
  bool is_empty() const { return pulls_.empty(); }

 private:
  enum class State { kQueued, kRequested, kMoving };
  struct PendingPull {
    std::shared_ptr<Pull> pull;
    State state = State::kQueued;
    LaneKind lane = LaneKind::kTcp;
    MemoryFiles files;             // for the grant that follows
    LaneSet tried = 0;             // lanes that could not carry it
    int tries = 1;                 // since bytes arrived last
    uint64_t received_before = 0;  // when the last try began
  };

  void Send(uint64_t id, PendingPull *pending);
  bool TakeAttached(uint64_t id, const Grant &grant);
  void StartLane(uint64_t id, const Grant &grant);
  void OnLaneReport(uint64_t id, uint64_t attempt, const Status &status);
  void TryNextLane(uint64_t id);
  void Finish(uint64_t id, const Status &status);
  static bool MayRetry(PendingPull *pending);

  const Context context_;
  PeerLink *const link_;
  PeerLanes *const lanes_;
  std::map<uint64_t, PendingPull> pulls_;
  // Tells a lane's report whether this object still exists.
  const std::shared_ptr<PeerPulls *> alive_ = std::make_shared<PeerPulls *>(this);
};

}  // namespace ray::rdt
