#include "ray/rdt/peer_calls.h"

#include <algorithm>
#include <utility>

#include "ray/rdt/limits.h"

namespace ray::rdt {

void PeerCalls::Add(std::shared_ptr<Call> call, Bytes payload) {
  link_->StartSilenceClock();
  uint64_t id = call->id;
  PendingCall &pending =
      calls_[id] = {.call = std::move(call), .payload = std::move(payload)};
  if (link_->is_connected()) Send(id, &pending);
}

void PeerCalls::SendAll() {
  for (auto &[id, pending] : calls_) {
    if (pending.state == State::kQueued) Send(id, &pending);
  }
}

void PeerCalls::Send(uint64_t id, PendingCall *pending) {
  pending->state = State::kSent;
  // The call may end what an earlier notice keeps alive.
  if (!notices_->is_empty()) notices_->Flush();
  link_->Send(EncodeFrame(pending->call->kind, id, ByteView(pending->payload)));
  if (!pending->call->is_idempotent) pending->payload = {};
}

void PeerCalls::FailUncertain() {
  std::erase_if(calls_, [this](const auto &entry) {
    if (entry.second.state != State::kUncertain) return false;
    entry.second.call->End(link_->WithAddress(
        {Code::kBroken, "the connection broke before the reply arrived"}));
    return true;
  });
}

bool PeerCalls::OnReply(uint64_t id, ByteView payload) {
  if (payload.empty()) return false;
  auto node = calls_.extract(id);
  if (!node) return true;  // cancelled
  node.mapped().call->Answer(payload[0] != 0, Bytes(payload.begin() + 1, payload.end()));
  return true;
}

void PeerCalls::OnLost(const Status &why, PeerLink::Loss loss) {
  for (auto it = calls_.begin(); it != calls_.end();) {
    auto here = it++;
    if (MayRetry(&here->second, loss)) continue;
    here->second.call->End(why);
    calls_.erase(here);
  }
}

bool PeerCalls::MayRetry(PendingCall *pending, PeerLink::Loss loss) {
  if (loss == PeerLink::Loss::kExited) return false;
  // A peer that was silent gets one more try: it may well be silent again.
  if (loss == PeerLink::Loss::kSilent) {
    pending->tries = std::max(pending->tries, limits::kMaxTries - 1);
  }
  if (pending->call->is_idempotent) {
    pending->state = State::kQueued;
  } else if (pending->state == State::kSent) {
    pending->state = State::kUncertain;
  }
  return ++pending->tries <= limits::kMaxTries;
}

void PeerCalls::FailAll(const Status &why) {
  for (auto &[id, pending] : std::exchange(calls_, {})) {
    bool is_loss = pending.tries > 1 && why.code == Code::kUnreachable;
    pending.call->End(is_loss ? Status{Code::kPeerLost, why.text} : why);
  }
}

}  // namespace ray::rdt
