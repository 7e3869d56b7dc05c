#include "ray/rdt/peer.h"

namespace ray::rdt {

bool Peer::Queue(Notice notice, const Key &key) {
  std::lock_guard<std::mutex> lock(mutex_);
  bool is_first = notices_.empty();
  (notice == Notice::kOwn ? notices_.owned : notices_.freed).push_back(key);
  return is_first;
}

LaneReasons Peer::Reasons() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return reasons_;
}

Notices Peer::TakeNotices() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(notices_, {});
}

void Peer::PutBackNotices(Notices notices) {
  std::lock_guard<std::mutex> lock(mutex_);
  notices_.owned.swap(notices.owned);
  notices_.freed.swap(notices.freed);
  notices_.owned.insert(notices_.owned.end(), notices.owned.begin(), notices.owned.end());
  notices_.freed.insert(notices_.freed.end(), notices.freed.begin(), notices.freed.end());
}

bool Peer::HasNotices() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return !notices_.empty();
}

void Peer::SetReasons(const LaneReasons &reasons) {
  std::lock_guard<std::mutex> lock(mutex_);
  reasons_ = reasons;
}

}  // namespace ray::rdt
