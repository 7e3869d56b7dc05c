#include "ray/rdt/peer_notices.h"

#include <utility>

#include "ray/rdt/limits.h"

namespace ray::rdt {

void PeerNotices::Send() {
  if (!link_->is_connected()) return link_->Connect();
  Clock::duration early = sent_at_ + limits::kNoticeInterval - Clock::now();
  if (early <= Clock::duration::zero()) return Flush();
  context_.loop->After(std::chrono::duration<double>(early).count(),
                       [weak = std::weak_ptr(alive_)] {
                         if (auto self = weak.lock()) (*self)->Send();
                       });
}

void PeerNotices::Flush() {
  sent_at_ = Clock::now();
  SendFreed(SendOwned());
}

// OWN comes first: a key that is in both lists ends up freed.
Notices PeerNotices::SendOwned() {
  Notices notices = queue_->TakeAll();
  SendKeys(FrameType::kOwn, notices.owned);
  return notices;
}

void PeerNotices::SendFreed(Notices notices) {
  SendKeys(FrameType::kFree, notices.freed);
  if (notices.empty()) return;
  link_->StartSilenceClock();
  unconfirmed_[++last_ping_] = std::move(notices);
  link_->Send(EncodeFrame(FrameType::kPing, last_ping_));
}

void PeerNotices::SendKeys(FrameType type, std::vector<Key> keys) {
  if (keys.empty()) return;
  link_->Send(EncodeFrame(type, 0, KeyList{.keys = std::move(keys)}));
}

void PeerNotices::OnPong(uint64_t ping) {
  unconfirmed_.erase(unconfirmed_.begin(), unconfirmed_.upper_bound(ping));
}

void PeerNotices::OnUnreachable(const Status &why) {
  Clock::time_point now = Clock::now();
  if (!unreachable_since_) unreachable_since_ = now;
  bool may_pass = why.code == Code::kUnreachable || why.code == Code::kIo;
  if (!may_pass || now - *unreachable_since_ > limits::kNoticesKept) DropAll();
  retry_at_ = now + limits::kNoticeRetryInterval;
}

void PeerNotices::OnLost(PeerLink::Loss loss) {
  if (loss == PeerLink::Loss::kExited) return DropAll();
  for (auto &[ping, notices] : std::exchange(unconfirmed_, {})) {
    queue_->PutBack(notices);
  }
}

bool PeerNotices::is_retry_due() const {
  return !queue_->is_empty() && Clock::now() >= retry_at_;
}

void PeerNotices::DropAll() {
  queue_->TakeAll();
  unconfirmed_.clear();
  unreachable_since_.reset();
}

}  // namespace ray::rdt
