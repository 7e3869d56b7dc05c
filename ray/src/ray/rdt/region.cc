#include "ray/rdt/region.h"

#include <algorithm>
#include <set>

namespace ray::rdt {

Status Region::Check() const {
  bool is_intact = std::ranges::all_of(guards_, [](const Guard &guard) {
    const auto *word = reinterpret_cast<const uint64_t *>(guard.address);
    return __atomic_load_n(word, __ATOMIC_ACQUIRE) == guard.value;
  });
  if (is_intact) return {};
  return {Code::kChanged,
          "the storage of one of its tensors was freed, resized or moved after the "
          "object was created"};
}

bool RegionTable::Register(const Key &key,
                           const std::vector<Span> &spans,
                           int64_t token,
                           std::vector<Guard> guards,
                           const Pool *frozen_in) {
  SpanList memory = CheckedSpans(spans);
  std::vector<FilePlace> places;
  if (frozen_in != nullptr) {
    uint64_t in_files = 0;
    for (const Span &span : memory.spans()) {
      places.push_back(frozen_in->PlaceOf(span));
      if (places.back().file) in_files += span.nbytes;
    }
    if (in_files <= memory.total() / 2) places.clear();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  auto [at, is_new] = regions_.try_emplace(key);
  if (is_new) {
    at->second.pin = std::make_shared<const Region>(
        std::move(memory), std::move(places), std::move(guards), token, events_);
  }
  return is_new;
}

bool RegionTable::Release(const Key &key) {
  Pin last;  // dropped after the lock: ~Region takes the event queue's
  std::lock_guard<std::mutex> lock(mutex_);
  auto node = regions_.extract(key);
  if (node) last = std::move(node.mapped().pin);
  return last != nullptr;
}

void RegionTable::ReleaseAll() {
  std::map<Key, Entry> all;  // dropped after the lock
  std::lock_guard<std::mutex> lock(mutex_);
  all.swap(regions_);
}

void RegionTable::SetOwner(const std::vector<Key> &keys, const AgentId &owner) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Key &key : keys) {
    if (auto found = regions_.find(key); found != regions_.end()) {
      found->second.owner = owner;
    }
  }
}

size_t RegionTable::CountOwned(const AgentId &owner) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::ranges::count_if(
      regions_, [&](const auto &region) { return region.second.owner == owner; });
}

size_t RegionTable::ReleaseOwned(const AgentId &owner) {
  std::vector<Pin> last;  // dropped after the lock
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(regions_, [&](auto &region) {
    if (region.second.owner != owner) return false;
    last.push_back(std::move(region.second.pin));
    return true;
  });
  return last.size();
}

std::vector<Key> RegionTable::Unowned(const std::vector<Key> &keys) const {
  std::vector<Key> unowned;
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Key &key : keys) {
    auto found = regions_.find(key);
    if (found != regions_.end() && found->second.owner == AgentId{})
      unowned.push_back(key);
  }
  return unowned;
}

size_t RegionTable::ReleaseUnowned(const std::vector<Key> &keys) {
  std::vector<Pin> last;  // dropped after the lock
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Key &key : keys) {
    auto found = regions_.find(key);
    if (found == regions_.end() || found->second.owner != AgentId{}) continue;
    last.push_back(std::move(found->second.pin));
    regions_.erase(found);
  }
  return last.size();
}

Pin RegionTable::Find(const Key &key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = regions_.find(key);
  return found == regions_.end() ? nullptr : found->second.pin;
}

Status RegionTable::FindIntact(const Key &key, Pin *pin) const {
  *pin = Find(key);
  if (!*pin) return {Code::kNotFound, "the producer has no such object (it was freed)"};
  return (*pin)->Check();
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

void PinTable::RemoveAll(const AgentId &consumer, const void *owner) {
  std::vector<Pin> last;  // dropped after the lock
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto at = pins_.lower_bound({consumer, 0});
       at != pins_.end() && at->first.first == consumer;) {
    auto here = at++;
    if (here->second.owner != owner) continue;
    last.push_back(std::move(here->second.pin));
    pins_.erase(here);
  }
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

uint64_t PinTable::nbytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::set<const Region *> regions;
  uint64_t total = 0;
  for (const auto &[pull, entry] : pins_) {
    if (regions.insert(entry.pin.get()).second) total += entry.pin->memory.total();
  }
  return total;
}

}  // namespace ray::rdt
