#include "ray/rdt/region.h"

#include <utility>

namespace ray::rdt {

bool RegionTable::Register(const Key &key, const std::vector<Span> &spans, int64_t token) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto [at, is_new] = regions_.try_emplace(key);
  if (is_new) at->second = std::make_shared<const Region>(spans, token, events_);
  return is_new;
}

bool RegionTable::Release(const Key &key) {
  Pin last;  // dropped after the lock: ~Region takes the event queue's
  std::lock_guard<std::mutex> lock(mutex_);
  auto node = regions_.extract(key);
  if (node) last = std::move(node.mapped());
  return last != nullptr;
}

void RegionTable::ReleaseAll() {
  std::map<Key, Pin> all;  // dropped after the lock
  std::lock_guard<std::mutex> lock(mutex_);
  all.swap(regions_);
}

Pin RegionTable::Find(const Key &key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = regions_.find(key);
  return found == regions_.end() ? nullptr : found->second;
}

size_t RegionTable::size() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return regions_.size();
}

void PinTable::Add(const AgentId &consumer, uint64_t pull, const void *owner, Pin pin) {
  Entry entry{owner, std::move(pin)};  // what it replaces is dropped after the lock
  std::lock_guard<std::mutex> lock(mutex_);
  std::swap(pins_[{consumer, pull}], entry);
}

void PinTable::Remove(const AgentId &consumer, uint64_t pull, const void *owner) {
  Pin last;  // dropped after the lock
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = pins_.find({consumer, pull});
  if (found == pins_.end() || found->second.owner != owner) return;
  last = std::move(found->second.pin);
  pins_.erase(found);
}

Pin PinTable::Find(const AgentId &consumer, uint64_t pull) const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = pins_.find({consumer, pull});
  return found == pins_.end() ? nullptr : found->second.pin;
}

size_t PinTable::size() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return pins_.size();
}

}  // namespace ray::rdt
