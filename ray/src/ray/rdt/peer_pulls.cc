#include "ray/rdt/peer_pulls.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "ray/rdt/limits.h"

namespace ray::rdt {

void PeerPulls::Add(std::shared_ptr<Pull> pull) {
  link_->StartSilenceClock();
  uint64_t id = pull->id;
  PendingPull &pending = pulls_[id] = {.pull = std::move(pull)};
  if (link_->is_connected()) Send(id, &pending);
}

void PeerPulls::Forget(uint64_t id) {
  auto node = pulls_.extract(id);
  if (node && node.mapped().state != State::kQueued) {
    link_->Send(EncodeFrame(FrameType::kAbort, id));
  }
}

void PeerPulls::SendAll() {
  // Send may end a pull and so change the map.
  std::vector<uint64_t> ids;
  for (auto &[id, pending] : pulls_) ids.push_back(id);
  for (uint64_t id : ids) {
    if (auto found = pulls_.find(id); found != pulls_.end()) Send(id, &found->second);
  }
}

void PeerPulls::Send(uint64_t id, PendingPull *pending) {
  Lane *lane = lanes_->Best(pending->tried, &pending->lane, pending->pull.get());
  if (lane == nullptr) {
    Status no_lane{Code::kRefused, "no usable lane to the peer is left"};
    return Finish(id, link_->WithAddress(no_lane));
  }
  pending->state = State::kRequested;
  pending->files.clear();
  pending->pull->set_lane(pending->lane);
  bool has_choice = pending->lane == LaneKind::kMap && lanes_->Find(LaneKind::kCma) &&
                    !HasLane(pending->tried, LaneKind::kCma);
  PullRequest request{.key = pending->pull->key,
                      .mode = has_choice ? PullMode::kAny : lane->mode(),
                      .max_attached = limits::kMaxAttached};
  link_->Send(EncodeFrame(FrameType::kPull, id, request));
}

bool PeerPulls::OnFile(uint64_t id, const std::optional<File> &file, Fds *attached) {
  if (!file || attached->empty()) return false;
  auto memory = MemoryFile::Open(std::move(attached->front()), file->nbytes);
  attached->pop_front();
  auto found = pulls_.find(id);
  if (found == pulls_.end()) return true;  // cancelled; an ABORT was sent
  MemoryFiles &files = found->second.files;
  files.push_back(std::move(memory));
  return files.size() <= limits::kMaxFilesOfObject;
}

bool PeerPulls::OnGrant(uint64_t id, const std::optional<Grant> &grant) {
  uint64_t span_bytes = 0;
  if (!grant || !TotalOf(grant->spans, &span_bytes)) return false;
  auto found = pulls_.find(id);
  if (found == pulls_.end()) return true;  // cancelled; an ABORT was sent
  PendingPull &pending = found->second;
  if (pending.state != State::kRequested) return false;
  if (Status fit = pending.pull->CheckTotal(grant->total); !fit.ok()) {
    Finish(id, fit);
    return true;
  }
  if (grant->total == 0 || !grant->attached.empty()) return TakeAttached(id, *grant);
  if (pending.lane == LaneKind::kMap && grant->files.empty()) {  // the producer's choice
    pending.lane = LaneKind::kCma;
    pending.pull->set_lane(pending.lane);
  }
  Lane *lane = lanes_->Find(pending.lane);
  if (lane == nullptr) {  // disabled since the PULL was sent
    TryNextLane(id);
    return true;
  }
  if (lane->mode() != PullMode::kStream && span_bytes != grant->total) return false;
  if (pending.pull->is_whole()) {  // complete when the last connection broke
    Finish(id, {});
  } else {
    StartLane(id, *grant);
  }
  return true;
}

bool PeerPulls::TakeAttached(uint64_t id, const Grant &grant) {
  if (grant.attached.size() != grant.total) return false;
  Pull &pull = *pulls_.at(id).pull;
  auto copy = [&](Range part) {
    pull.destination.CopyIn(part, grant.attached.data() + part.offset);
    return Status{};
  };
  Range range;
  bool is_whole = false;
  while (pull.TakeRange(pull.attempt(), grant.total, &range)) {
    pull.Receive(pull.attempt(), range, copy, &is_whole);
  }
  Finish(id, {});
  return true;
}

void PeerPulls::StartLane(uint64_t id, const Grant &grant) {
  PendingPull &pending = pulls_.at(id);
  pending.state = State::kMoving;
  uint64_t attempt = pending.pull->attempt();
  auto report = [loop = context_.loop, weak = std::weak_ptr(alive_), id, attempt](
                    const Status &status) {
    loop->Post([weak, id, attempt, status] {
      if (auto self = weak.lock()) (*self)->OnLaneReport(id, attempt, status);
    });
  };
  lanes_->Find(pending.lane)
      ->Start(pending.pull, grant, std::exchange(pending.files, {}), std::move(report));
}

bool PeerPulls::OnRefuse(uint64_t id, const std::optional<Refuse> &refuse) {
  if (!refuse) return false;
  auto found = pulls_.find(id);
  if (found == pulls_.end()) return true;
  if (found->second.state != State::kRequested) return false;
  Code code = CodeFromWire(refuse->code);
  if (code == Code::kRefused) {  // the lane cannot carry the object
    TryNextLane(id);
  } else {
    Finish(id, link_->WithAddress({code, refuse->text}));
  }
  return true;
}

void PeerPulls::OnLaneReport(uint64_t id, uint64_t attempt, const Status &status) {
  auto found = pulls_.find(id);
  if (found == pulls_.end() || found->second.pull->attempt() != attempt) return;
  PendingPull &pending = found->second;
  bool read_memory = pending.lane == LaneKind::kCma;
  if (read_memory && status.ok() && !link_->IsSameProcess()) {
    return link_->Lose("the peer exited during the pull", PeerLink::Loss::kBroken);
  }
  // A data connection may break before the control connection does.
  if (status.code == Code::kIo && pending.tries < limits::kMaxTries) {
    link_->Send(EncodeFrame(FrameType::kAbort, id));
    MayRetry(&pending);
    return Send(id, &pending);
  }
  if (status.code != Code::kRefused) return Finish(id, status);
  if (lanes_->Find(pending.lane)) lanes_->Disable(pending.lane, status.text);
  TryNextLane(id);
}

void PeerPulls::TryNextLane(uint64_t id) {
  PendingPull &pending = pulls_.at(id);
  link_->Send(EncodeFrame(FrameType::kAbort, id));
  pending.pull->Restart();
  pending.tried |= LaneBit(pending.lane);
  Send(id, &pending);
}

void PeerPulls::Finish(uint64_t id, const Status &status) {
  auto node = pulls_.extract(id);
  PendingPull &pending = node.mapped();
  // A mapping lasts longer than the pull: its end tells the producer.
  bool is_mapped =
      status.ok() && pending.lane == LaneKind::kMap && pending.state == State::kMoving;
  if (status.ok()) {
    context_.counters->CountPull(pending.lane, pending.pull->destination.total());
    if (!is_mapped) context_.huge_pages->RecordPull(pending.pull->destination, nullptr);
  }
  pending.pull->End(status);
  if (pending.state != State::kQueued && !is_mapped)
    link_->Send(EncodeFrame(FrameType::kDone, id));
}

void PeerPulls::OnLost(const Status &why, PeerLink::Loss loss) {
  for (auto it = pulls_.begin(); it != pulls_.end();) {
    auto here = it++;
    PendingPull &pending = here->second;
    // A peer that was silent gets one more try: it may well be silent again.
    if (loss == PeerLink::Loss::kSilent) {
      pending.tries = std::max(pending.tries, limits::kMaxTries - 1);
    }
    if (loss != PeerLink::Loss::kExited && MayRetry(&pending)) continue;
    pending.pull->End(why);
    pulls_.erase(here);
  }
}

// Ends the attempt. If tries are left, the pull is queued for what has not arrived.
bool PeerPulls::MayRetry(PendingPull *pending) {
  pending->pull->Resume();
  uint64_t received = pending->pull->received_bytes();
  int tries = received == pending->received_before ? pending->tries + 1 : 2;
  if (tries > limits::kMaxTries) return false;
  *pending = {.pull = pending->pull, .tries = tries, .received_before = received};
  return true;
}

void PeerPulls::FailAll(const Status &why) {
  for (auto &[id, pending] : std::exchange(pulls_, {})) {
    bool is_loss = pending.tries > 1 && why.code == Code::kUnreachable;
    pending.pull->End(is_loss ? Status{Code::kPeerLost, why.text} : why);
  }
}

}  // namespace ray::rdt
