// The names of the lanes, and the pure code that selects them.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace ray::rdt {

// In order of preference. Numbers are bits in the handshake's lane sets.
enum class LaneKind : uint8_t { kInproc = 0, kMap = 1, kCma = 2, kShm = 3, kTcp = 4 };

inline constexpr size_t kLaneCount = 5;
inline constexpr std::array<const char *, kLaneCount> kLaneNames = {
    "inproc", "map", "cma", "shm", "tcp"};

using LaneSet = uint32_t;

constexpr LaneSet LaneBit(LaneKind lane) { return 1u << static_cast<unsigned>(lane); }
constexpr bool HasLane(LaneSet set, LaneKind lane) { return (set & LaneBit(lane)) != 0; }
inline const char *LaneName(LaneKind lane) {
  return kLaneNames[static_cast<size_t>(lane)];
}

// The facts that decide which lanes a new connection can use.
struct LaneInputs {
  LaneSet mine = 0;
  LaneSet theirs = 0;
  bool is_same_agent = false;
  bool is_unix = false;         // one host, one network namespace
  std::string cma_probe_error;  // empty: the peer's memory can be read
  std::string no_tcp_reason;    // empty: it listens, and unencrypted TCP is allowed
};

// For each lane "ok" or the reason why it cannot be used.
using LaneReasons = std::array<std::string, kLaneCount>;
LaneReasons EvaluateLanes(const LaneInputs &inputs);

}  // namespace ray::rdt
