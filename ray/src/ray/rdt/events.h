// Events for Python, among them log lines.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "ray/rdt/loop.h"
#include "ray/rdt/wire.h"

namespace ray::rdt {

struct Event {
  enum class Kind { kReleased, kLog, kCall, kLost, kStopped };
  Kind kind = Kind::kStopped;
  std::vector<int64_t> tokens;  // kReleased: as given to Register
  std::string level;            // kLog: "info" or "warning"
  std::string text;             // kLog
  uint64_t call = 0;            // kCall: the argument for Reply
  AgentId agent{};              // kCall, kLost: the other side
  Bytes payload;                // kCall
};

// Runs on: any thread. Push never blocks for long; Next blocks.
class EventQueue {
 public:
  void Push(Event event);
  // Merged with other releases that were not fetched yet.
  void PushReleased(int64_t token);
  // Waits up to timeout_s for the first event, then returns all.
  std::vector<Event> Next(double timeout_s);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Event> events_;      // guarded by mutex_
  std::vector<int64_t> released_;  // guarded by mutex_
};

// Log lines, with a rate limit for each kind.
class Log {
 public:
  explicit Log(EventQueue *events) : events_(events) {}
  void Info(const std::string &kind, const std::string &text) {
    Write("info", kind, text);
  }
  void Warning(const std::string &kind, const std::string &text) {
    Write("warning", kind, text);
  }

 private:
  struct Rate {
    Clock::time_point since;
    int written = 0;
    int dropped = 0;
  };

  void Write(const char *level, const std::string &kind, std::string text);

  EventQueue *const events_;
  std::mutex mutex_;
  std::map<std::string, Rate> rates_;  // guarded by mutex_
};

}  // namespace ray::rdt
