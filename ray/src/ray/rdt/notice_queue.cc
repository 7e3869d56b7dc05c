#include "ray/rdt/notice_queue.h"

#include <utility>

namespace ray::rdt {

bool NoticeQueue::Add(Notice notice, const Key &key) {
  std::lock_guard<std::mutex> lock(mutex_);
  bool was_empty = notices_.empty();
  (notice == Notice::kOwn ? notices_.owned : notices_.freed).push_back(key);
  return was_empty;
}

Notices NoticeQueue::TakeAll() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(notices_, {});
}

void NoticeQueue::PutBack(Notices notices) {
  std::lock_guard<std::mutex> lock(mutex_);
  notices_.owned.swap(notices.owned);
  notices_.freed.swap(notices.freed);
  notices_.owned.insert(notices_.owned.end(), notices.owned.begin(), notices.owned.end());
  notices_.freed.insert(notices_.freed.end(), notices.freed.begin(), notices.freed.end());
}

bool NoticeQueue::is_empty() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return notices_.empty();
}

}  // namespace ray::rdt
