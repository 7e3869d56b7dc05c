#include "ray/rdt/peer.h"

namespace ray::rdt {

bool Peer::QueueFree(const Key &key) {
  std::lock_guard<std::mutex> lock(mutex_);
  frees_.push_back(key);
  return frees_.size() == 1;
}

LaneReasons Peer::Reasons() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return reasons_;
}

std::vector<Key> Peer::TakeFrees() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(frees_, {});
}

void Peer::SetReasons(const LaneReasons &reasons) {
  std::lock_guard<std::mutex> lock(mutex_);
  reasons_ = reasons;
}

}  // namespace ray::rdt
