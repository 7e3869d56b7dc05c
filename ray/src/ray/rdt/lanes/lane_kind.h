// The names of the lanes, and the choice between them as pure code.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace ray::rdt {

// In order of preference. Numbers are bits in the handshake's lane sets.
enum class LaneKind : uint8_t { kInproc = 0, kCma = 1, kShm = 2, kTcp = 3 };

inline constexpr size_t kLaneCount = 4;
inline constexpr std::array<const char *, kLaneCount> kLaneNames = {
    "inproc", "cma", "shm", "tcp"};

using LaneSet = uint32_t;

constexpr LaneSet LaneBit(LaneKind lane) { return 1u << static_cast<unsigned>(lane); }
constexpr bool HasLane(LaneSet set, LaneKind lane) { return (set & LaneBit(lane)) != 0; }
inline const char *LaneName(LaneKind lane) {
  return kLaneNames[static_cast<size_t>(lane)];
}

// What both sides know about each other once a connection is up.
struct LaneInputs {
  LaneSet mine = 0;
  LaneSet theirs = 0;
  bool is_same_agent = false;
  bool is_unix = false;         // one host, one network namespace
  std::string cma_probe_error;  // empty: their memory can be read
  bool has_tcp = false;         // the peer listens and clear text is allowed
  std::string no_tcp_reason;
};

// For each lane "ok" or why it cannot serve this pair.
using LaneReasons = std::array<std::string, kLaneCount>;
LaneReasons EvaluateLanes(const LaneInputs &inputs);

// The lanes that are "ok", best first.
std::vector<LaneKind> UsableLanes(const LaneReasons &reasons);

}  // namespace ray::rdt
