#include "check.h"
#include "ray/rdt/region.h"

namespace ray::rdt {
namespace {

constexpr Key kKey = {1};

std::vector<int64_t> Released(EventQueue *events) {
  std::vector<int64_t> tokens;
  for (Event &event : events->Next(0)) {
    tokens.insert(tokens.end(), event.tokens.begin(), event.tokens.end());
  }
  return tokens;
}

TEST("region: the token comes back at once without readers") {
  EventQueue events;
  RegionTable table(&events);
  CHECK(table.Register(kKey, {}, 7));
  CHECK(!table.Register(kKey, {}, 8));
  CHECK(Released(&events).empty());
  CHECK(table.Release(kKey));
  CHECK(!table.Release(kKey));
  CHECK(Released(&events) == std::vector<int64_t>{7});
}

TEST("region: a pin outlives the release and brings the token when it ends") {
  EventQueue events;
  RegionTable table(&events);
  table.Register(kKey, {}, 7);
  Pin pin = table.Find(kKey);
  Pin second = pin;
  table.Release(kKey);
  CHECK(table.Find(kKey) == nullptr);
  pin.reset();
  CHECK(Released(&events).empty());
  second.reset();
  CHECK(Released(&events) == std::vector<int64_t>{7});
}

TEST("region: releases that were not fetched come as one event") {
  EventQueue events;
  RegionTable table(&events);
  table.Register({1}, {}, 1);
  table.Register({2}, {}, 2);
  table.ReleaseAll();
  CHECK_EQ(events.Next(0).size(), 1u);
  CHECK_EQ(table.size(), 0u);
}

TEST("region: an old connection's end does not take a new one's pin") {
  EventQueue events;
  RegionTable table(&events);
  table.Register(kKey, {}, 7);
  PinTable pins;
  AgentId consumer{};
  int old_owner = 0;
  int new_owner = 0;
  pins.Add(consumer, 1, &old_owner, table.Find(kKey));
  pins.Add(consumer, 1, &new_owner, table.Find(kKey));
  pins.Remove(consumer, 1, &old_owner);
  CHECK(pins.Find(consumer, 1) != nullptr);
  pins.Remove(consumer, 1, &new_owner);
  CHECK(pins.Find(consumer, 1) == nullptr);
}

TEST("region: regions without an owner are released by their keys") {
  constexpr Key kOther = {2};
  constexpr Key kUnknown = {3};
  constexpr AgentId kOwner = {9};
  EventQueue events;
  RegionTable table(&events);
  table.Register(kKey, {}, 7);
  table.Register(kOther, {}, 8);
  table.SetOwner({kKey}, kOwner);
  CHECK(table.Unowned({kKey, kOther, kUnknown}).size() == 1);
  CHECK(table.ReleaseUnowned({kKey, kOther, kUnknown}) == 1);
  CHECK(Released(&events) == std::vector<int64_t>{8});
  CHECK(table.Find(kKey) != nullptr);
}

}  // namespace
}  // namespace ray::rdt
