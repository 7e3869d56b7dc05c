// Settings and services that the parts of one agent share.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "ray/rdt/address.h"
#include "ray/rdt/auth.h"
#include "ray/rdt/copy_pool.h"
#include "ray/rdt/events.h"
#include "ray/rdt/file_pool.h"
#include "ray/rdt/huge_pages.h"
#include "ray/rdt/lanes/lane_kind.h"
#include "ray/rdt/mailbox.h"
#include "ray/rdt/pool.h"

namespace ray::rdt {

// Set by the user.
struct Settings {
  std::string bind_ip;
  LaneSet lanes = 0;
  int copy_threads = 2;
  int tcp_streams = 4;
  uint64_t pool_bytes = 0;
  double connect_timeout_s = 10;
  double peer_timeout_s = 30;
  bool clear_tcp = true;  // false: no connection may cross the network unencrypted
};

struct LaneCounters {
  std::atomic<uint64_t> pulls{0};     // completed, as consumer
  std::atomic<uint64_t> bytes_in{0};  // of those
};

// Numbers for Agent::Stats. Written on any thread.
struct Counters {
  std::atomic<uint64_t> bytes_granted{0};  // as producer, on all lanes
  std::array<LaneCounters, kLaneCount> lanes;
  std::atomic<int64_t> pulls_live{0};  // started here and not settled
  std::atomic<int64_t> calls_live{0};
  std::atomic<int64_t> connections{0};  // authenticated, for control, both directions

  void CountPull(LaneKind lane, uint64_t nbytes) {
    ++lanes[static_cast<size_t>(lane)].pulls;
    lanes[static_cast<size_t>(lane)].bytes_in += nbytes;
  }
};

// Owned by the agent, which outlives its peers.
struct Context {
  Loop *loop;
  CopyPool *copies;
  HugePages *huge_pages;
  std::shared_ptr<Mailbox> mailbox;
  Pool *pool;
  FilePool *files;
  EventQueue *events;
  Log *log;
  Counters *counters;
  const Settings *settings;
  const Identity *identity;
  const Address *self;
};

}  // namespace ray::rdt
