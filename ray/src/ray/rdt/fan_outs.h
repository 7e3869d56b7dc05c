// The expectation whether an object will have several consumers on its host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>

#include "ray/rdt/limits.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// Programs repeat: objects of a size that had several consumers will have them again. A
// shared copy is worse for one consumer alone, whose memory would be mapped each time.
//
// Runs on: the agent's loop.
class FanOuts {
 public:
  // Counts a pull. True if the consumer gets a shared copy: others pulled the object
  // before, or are expected to.
  bool Expects(const Region &region, const AgentId &consumer) {
    if (scores_.size() >= limits::kMaxFanOuts) scores_.clear();
    int &score = scores_[region.memory.total()];
    if (region.first_consumer == AgentId{}) {
      region.first_consumer = consumer;
      return std::exchange(score, std::max(score - 1, 0)) > 0;
    }
    if (region.first_consumer == consumer) return !region.copy.expired();
    score = std::min(score + 2, limits::kMaxFanOutScore);
    return true;
  }

 private:
  std::map<uint64_t, int> scores_;  // by total bytes
};

}  // namespace ray::rdt
