// A thread that waits on an epoll set. All threads of the agent are of this kind.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ray/rdt/fd.h"

namespace ray::rdt {

using Clock = std::chrono::steady_clock;

// Runs on: its own thread, named `name`. Post and Stop may be called on any thread, the
// other methods only on the loop's thread or before Start.
// Callbacks must not block and must not throw.
class Loop {
 public:
  using Task = std::function<void()>;
  using OnReady = std::function<void(uint32_t events)>;
  using Id = uint64_t;

  explicit Loop(std::string name);
  ~Loop();  // stops, joins, drops posted tasks that have not run

  void Start();
  void Stop();  // returns when the thread has ended; idempotent

  // Runs `task` on the loop's thread, in the order posted. After Stop it is
  // dropped.
  void Post(Task task);

  // Calls `ready` while `fd` has one of `events` (level-triggered). Ids are not reused,
  // so an event that was fetched for an ended watch does not reach a new owner of the
  // same fd. Returns 0, which Unwatch and Rearm ignore, and sets errno if the system
  // refuses.
  Id Watch(int fd, uint32_t events, OnReady ready);
  void Rearm(Id watch, uint32_t events);
  void Unwatch(Id watch);

  Id After(double seconds, Task task);
  void CancelTimer(Id timer);

 private:
  struct Watched {
    int fd;
    std::shared_ptr<OnReady> ready;
  };

  void Run();
  void RunPosted();
  void RunTimers();
  void WaitForEvents();
  int TimeoutMs();

  const std::string name_;
  Fd epoll_;
  Fd wake_;
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::vector<Task> posted_;  // guarded by mutex_
  bool woken_ = false;        // guarded by mutex_: wake_ was written for posted_
  Id next_id_ = 1;
  std::unordered_map<Id, Watched> watched_;
  std::map<std::pair<Clock::time_point, Id>, Task> timers_;
  std::thread thread_;
};

}  // namespace ray::rdt
