#include "ray/rdt/loop.h"

#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

namespace ray::rdt {
namespace {

constexpr Loop::Id kWakeId = 0;
// The loop that runs on this thread.
thread_local const Loop *current_loop = nullptr;

int Checked(int fd, const char *what) {
  if (fd < 0) throw std::system_error(errno, std::generic_category(), what);
  return fd;
}

// Signals are for the program's own threads, so a loop's thread starts with them blocked.
// Faults are not blocked: they must reach the program's fault handler.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

Loop::Loop(std::string name)
    : name_(std::move(name)),
      epoll_(Checked(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")),
      wake_(Checked(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd")) {
  epoll_event event{.events = EPOLLIN, .data = {.u64 = kWakeId}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event);
}

Loop::~Loop() { Stop(); }

void Loop::Start() {
  SignalsBlocked inherited_by_the_thread;
  thread_ = std::thread([this] { Run(); });
}

void Loop::Stop() {
  stopping_ = true;
  Post([] {});
  if (thread_.joinable()) thread_.join();
}

void Loop::Post(Task task) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    posted_.push_back(std::move(task));
    // The loop looks for tasks before it waits.
    if (current_loop == this || std::exchange(woken_, true)) return;
  }
  eventfd_write(wake_.get(), 1);
}

Loop::Id Loop::Watch(int fd, uint32_t events, OnReady ready) {
  Id id = next_id_++;
  epoll_event event{.events = events, .data = {.u64 = id}};
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) return 0;
  watched_[id] = {fd, std::make_shared<OnReady>(std::move(ready))};
  return id;
}

void Loop::Rearm(Id watch, uint32_t events) {
  auto found = watched_.find(watch);
  if (found == watched_.end()) return;
  epoll_event event{.events = events, .data = {.u64 = watch}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, found->second.fd, &event);
}

void Loop::Unwatch(Id watch) {
  auto found = watched_.find(watch);
  if (found == watched_.end()) return;
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, found->second.fd, nullptr);
  watched_.erase(found);
}

Loop::Id Loop::After(double seconds, Task task) {
  auto delay =
      std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  Id id = next_id_++;
  timers_[{Clock::now() + delay, id}] = std::move(task);
  return id;
}

void Loop::CancelTimer(Id timer) {
  std::erase_if(timers_, [timer](const auto &one) { return one.first.second == timer; });
}

void Loop::Run() {
  pthread_setname_np(pthread_self(), name_.c_str());
  current_loop = this;
  while (!stopping_) {
    RunPosted();
    RunTimers();
    if (!stopping_) WaitForEvents();
  }
}

void Loop::RunPosted() {
  std::vector<Task> tasks;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tasks.swap(posted_);
    woken_ = false;
  }
  for (Task &task : tasks) task();
}

void Loop::RunTimers() {
  Clock::time_point now = Clock::now();
  while (!timers_.empty() && timers_.begin()->first.first <= now) {
    timers_.extract(timers_.begin()).mapped()();
  }
}

void Loop::WaitForEvents() {
  std::array<epoll_event, 64> ready;
  int count = epoll_wait(epoll_.get(), ready.data(), ready.size(), TimeoutMs());
  for (int i = 0; i < count; ++i) {
    Id id = ready[i].data.u64;  // a copy: the kernel's struct is packed
    if (id == kWakeId) {
      eventfd_t ignored;
      eventfd_read(wake_.get(), &ignored);
      continue;
    }
    auto found = watched_.find(id);
    if (found == watched_.end()) continue;
    std::shared_ptr<OnReady> keep = found->second.ready;  // it may unwatch itself
    (*keep)(ready[i].events);
  }
}

int Loop::TimeoutMs() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!posted_.empty()) return 0;
  }
  if (timers_.empty()) return -1;
  auto left = timers_.begin()->first.first - Clock::now();
  auto ms = std::chrono::ceil<std::chrono::milliseconds>(left).count();
  return static_cast<int>(std::clamp<int64_t>(ms, 0, 60'000));
}

}  // namespace ray::rdt
