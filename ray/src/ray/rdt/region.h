// The memory that this agent serves.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ray/rdt/checksum.h"
#include "ray/rdt/events.h"
#include "ray/rdt/spans.h"
#include "ray/rdt/status.h"

namespace ray::rdt {

// A word of the caller's, eight bytes aligned, that changes when the memory that was
// registered with it is freed, resized or moved: what owns the memory has it.
struct Guard {
  uint64_t address = 0;
  uint64_t value = 0;
};

// Memory of the caller, who keeps it and its guards alive until the region's token
// comes back. The memory may be gone all the same, where the caller's own code has
// freed it: so guards are looked at before it is read, and reading it is no plain
// copying (read_memory.h).
// A pin is a shared_ptr: whoever holds one may read the memory, and the last
// one to let go, on whatever thread, sends the token back.
class Region {
 public:
  Region(const std::vector<Span> &spans,
         std::vector<Guard> guards,
         int64_t token,
         EventQueue *events)
      : memory(spans), guards_(std::move(guards)), token_(token), events_(events) {}
  ~Region() { events_->PushReleased(token_); }
  Region(const Region &) = delete;
  Region &operator=(const Region &) = delete;

  // Ok, or kChanged: the memory is not what was registered.
  Status Check() const;

  const SpanList memory;
  // The memory's checksum as it was when the first consumer asked.
  mutable LazyChecksum checksum;

 private:
  const std::vector<Guard> guards_;
  const int64_t token_;
  EventQueue *const events_;
};

using Pin = std::shared_ptr<const Region>;

// Runs on: any thread.
class RegionTable {
 public:
  explicit RegionTable(EventQueue *events) : events_(events) {}

  // False when the key is taken; then no token comes back for the call.
  bool Register(const Key &key,
                const std::vector<Span> &spans,
                int64_t token,
                std::vector<Guard> guards = {});
  // False when there is no such region. Running pulls keep what they pinned.
  bool Release(const Key &key);
  void ReleaseAll();
  // Unknown keys have been released already.
  void SetOwner(const std::vector<Key> &keys, const AgentId &owner);
  size_t CountOwned(const AgentId &owner) const;
  // Returns how many there were.
  size_t ReleaseOwned(const AgentId &owner);
  // Those of the keys that are here and that nobody has told to own.
  std::vector<Key> Unowned(const std::vector<Key> &keys) const;
  size_t ReleaseUnowned(const std::vector<Key> &keys);
  Pin Find(const Key &key) const;
  size_t size() const;

 private:
  EventQueue *const events_;
  mutable std::mutex mutex_;
  struct Entry {
    Pin pin;
    AgentId owner{};  // all zero: nobody has told
  };

  std::map<Key, Entry> regions_;  // guarded by mutex_
};

// Pins of the pulls that are under way, found by who pulls and its pull id.
// Data connections look here for what a control connection was granted.
// Runs on: any thread.
class PinTable {
 public:
  // `owner` is the control connection. A consumer that lost its connection may
  // ask again, under the same id, before the end of the old one was seen here.
  void Add(const AgentId &consumer, uint64_t pull, const void *owner, Pin pin);
  void Remove(const AgentId &consumer, uint64_t pull, const void *owner);
  Pin Find(const AgentId &consumer, uint64_t pull) const;
  size_t size() const;
  // What is read at the moment; a region with several readers counts once.
  uint64_t nbytes() const;

 private:
  struct Entry {
    const void *owner = nullptr;
    Pin pin;
  };

  mutable std::mutex mutex_;
  std::map<std::pair<AgentId, uint64_t>, Entry> pins_;  // guarded by mutex_
};

}  // namespace ray::rdt
