// One-way messages from an owner to a producer, until they are sent.
#pragma once

#include <mutex>
#include <vector>

#include "ray/rdt/wire.h"

namespace ray::rdt {

enum class Notice { kOwn, kFree };

struct Notices {
  std::vector<Key> owned;
  std::vector<Key> freed;

  bool empty() const { return owned.empty() && freed.empty(); }
};

// Runs on: any thread.
class NoticeQueue {
 public:
  // True if the queue was empty.
  bool Add(Notice notice, const Key &key);
  Notices TakeAll();
  // Puts notices back in front of those added since.
  void PutBack(Notices notices);
  bool is_empty() const;

 private:
  mutable std::mutex mutex_;
  Notices notices_;  // guarded by mutex_
};

}  // namespace ray::rdt
