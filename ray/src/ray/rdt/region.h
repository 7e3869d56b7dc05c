// Memory that this agent serves.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ray/rdt/checksum.h"
#include "ray/rdt/events.h"
#include "ray/rdt/pool.h"
#include "ray/rdt/spans.h"
#include "ray/rdt/status.h"

namespace ray::rdt {

class SharedCopy;

// An aligned 8-byte word in the object that owns the registered memory. It changes when
// the memory is freed, resized or moved.
struct Guard {
  uint64_t address = 0;
  uint64_t value = 0;
};

// Memory of the caller, which keeps it and its guards alive until the region's token is
// returned. User code may free the memory earlier. So the guards are checked before a
// read, and the memory is read by system calls (read_memory.h).
//
// A pin is a shared_ptr. Its holders may read the memory. When the last one is released,
// on any thread, the token is returned.
class Region {
 public:
  Region(SpanList memory,
         std::vector<FilePlace> places,
         std::vector<Guard> guards,
         int64_t token,
         EventQueue *events)
      : memory(std::move(memory)),
        places(std::move(places)),
        guards_(std::move(guards)),
        token_(token),
        events_(events) {}
  ~Region() { events_->PushReleased(token_); }
  Region(const Region &) = delete;
  Region &operator=(const Region &) = delete;

  // Ok, or kChanged if the memory was freed, resized or moved.
  Status Check() const;

  const SpanList memory;
  // If most of the memory is in files and does not change, for each span where it is in a
  // file. Else empty.
  const std::vector<FilePlace> places;
  // Computed at the first request.
  mutable LazyChecksum checksum;
  // The next two are used on the agent's loop only. The copy exists while consumers use
  // it.
  mutable std::weak_ptr<SharedCopy> copy;
  mutable AgentId first_consumer{};

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

  // The caller keeps the memory and its guards alive until a kReleased event returns the
  // token. False if the key is in use: then no token is returned. Throws
  // std::invalid_argument if the spans overflow the address space. With `frozen_in`, the
  // memory does not change any more, and parts in files of this pool need no copy.
  bool Register(const Key &key,
                const std::vector<Span> &spans,
                int64_t token,
                std::vector<Guard> guards = {},
                const Pool *frozen_in = nullptr);
  // False if there is no such region. Pulls in flight keep their pins.
  bool Release(const Key &key);
  void ReleaseAll();
  // Ignores unknown keys: they have been released.
  void SetOwner(const std::vector<Key> &keys, const AgentId &owner);
  size_t CountOwned(const AgentId &owner) const;
  // Returns the number of released regions.
  size_t ReleaseOwned(const AgentId &owner);
  // Those of the keys that are registered and have no owner.
  std::vector<Key> Unowned(const std::vector<Key> &keys) const;
  size_t ReleaseUnowned(const std::vector<Key> &keys);
  Pin Find(const Key &key) const;
  // kNotFound, or the region's status.
  Status FindIntact(const Key &key, Pin *pin) const;
  size_t size() const;

 private:
  EventQueue *const events_;
  mutable std::mutex mutex_;
  struct Entry {
    Pin pin;
    AgentId owner{};  // all zero: none is known
  };

  std::map<Key, Entry> regions_;  // guarded by mutex_
};

// Pins of the pulls in flight, by consumer and pull id. Data connections find here the
// regions that their control connection was granted.
// Runs on: any thread.
class PinTable {
 public:
  // `owner` is the control connection. A consumer that lost its connection may request
  // the pull again, with the same id, before the loss was detected here.
  void Add(const AgentId &consumer, uint64_t pull, const void *owner, Pin pin);
  void Remove(const AgentId &consumer, uint64_t pull, const void *owner);
  void RemoveAll(const AgentId &consumer, const void *owner);
  Pin Find(const AgentId &consumer, uint64_t pull) const;
  size_t size() const;
  // The pinned bytes. A region with several pins counts once.
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
