#include "ray/rdt/events.h"

#include "ray/rdt/limits.h"

namespace ray::rdt {

void EventQueue::Push(Event event) {
  std::lock_guard<std::mutex> lock(mutex_);
  events_.push_back(std::move(event));
  changed_.notify_one();
}

void EventQueue::PushReleased(int64_t token) {
  std::lock_guard<std::mutex> lock(mutex_);
  released_.push_back(token);
  changed_.notify_one();
}

std::vector<Event> EventQueue::Next(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), [this] {
    return !events_.empty() || !released_.empty();
  });
  std::vector<Event> taken;
  if (!released_.empty()) {
    taken.push_back(
        {.kind = Event::Kind::kReleased, .tokens = std::exchange(released_, {})});
  }
  for (Event &event : events_) taken.push_back(std::move(event));
  events_.clear();
  return taken;
}

void Log::Write(const char *level, const std::string &kind, std::string text) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Rate &rate = rates_[kind];
    Clock::time_point now = Clock::now();
    if (now - rate.since > std::chrono::seconds(1)) {
      if (rate.dropped > 0) {
        text += " (" + std::to_string(rate.dropped) + " similar lines were dropped)";
      }
      rate = {.since = now};
    }
    if (rate.written == limits::kLogLinesPerSecond) {
      ++rate.dropped;
      return;
    }
    ++rate.written;
  }
  events_->Push({.kind = Event::Kind::kLog, .level = level, .text = std::move(text)});
}

}  // namespace ray::rdt
