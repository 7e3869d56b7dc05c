// What several of the native tests need: agents, data and other processes.
#pragma once

#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "ray/rdt/agent.h"

namespace fixtures {

using namespace ray::rdt;

inline constexpr double kLong = 30;  // a wait that only a bug makes this long
inline constexpr LaneSet kAllLanes = 0b11111;

inline std::string ReasonOf(const LaneReasons &reasons, LaneKind lane) {
  return reasons[static_cast<size_t>(lane)];
}

Settings TestSettings(LaneSet lanes = kAllLanes);
std::unique_ptr<Agent> MakeAgent(LaneSet lanes = kAllLanes);

Key KeyOf(uint8_t number);

// Memory with known contents, cut into pieces of any length, empty ones too.
// Declared before the agent that serves it, so that it outlives that.
class Memory {
 public:
  explicit Memory(size_t nbytes) : bytes_(nbytes) {}

  void FillRandom(uint32_t seed);
  // `cuts` many spans that cover all, in order.
  std::vector<Span> Cut(size_t cuts, uint32_t seed) const;
  std::vector<Span> Whole() const { return Cut(1, 0); }
  size_t size() const { return bytes_.size(); }
  uint8_t *data() { return bytes_.data(); }
  bool operator==(const Memory &other) const { return bytes_ == other.bytes_; }

 private:
  std::vector<uint8_t> bytes_;
};

// The parts of an Acceptor and a Connector, without an agent. The test starts the
// loop.
struct Bench {
  Bench() { self.agent.fill(5), address = DescribeThisProcess(self.agent); }
  Loop loop{"test"};
  EventQueue events;
  Log log{&events};
  Counters counters;
  CopyPool copies{1};
  Settings settings = TestSettings();
  Identity self{.secret = "secret", .lanes = kAllLanes};
  Address address;
  Context context{.loop = &loop,
                  .copies = &copies,
                  .huge_pages = nullptr,
                  .events = &events,
                  .log = &log,
                  .counters = &counters,
                  .settings = &settings,
                  .identity = &self,
                  .self = &address};
};

// Waits, fails the test if it takes long, and gives the result.
Status Outcome(Completion *completion, double timeout_s = kLong);
// Collects events until one of that kind came; none if it did not in time.
std::optional<Event> AwaitEvent(Agent *agent, Event::Kind kind, double timeout_s = kLong);
// True if `condition` came true.
bool Await(const std::function<bool()> &condition, double timeout_s = kLong);

// This program again as another process, with an agent that serves `nbytes`
// random bytes (seed 1) under KeyOf(1). Ends with its destructor.
class Producer {
 public:
  Producer(size_t nbytes, LaneSet lanes);
  ~Producer();

  const Bytes &address() const { return address_; }
  void Stop() const;  // by a signal; returns once it has stopped
  void Continue() const;
  void Kill();

  // The other process's main.
  static int Main(size_t nbytes, LaneSet lanes);

 private:
  pid_t pid_ = -1;
  Fd keep_alive_;  // the producer ends when this does
  Bytes address_;
};

}  // namespace fixtures
