#include "ray/rdt/completion.h"

#include <poll.h>
#include <sys/eventfd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <system_error>

namespace ray::rdt {

bool Completion::is_settled() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return settled_.has_value();
}

Status Completion::status() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return settled_.value_or(Status{});
}

int Completion::EventFd() {
  int event = TryEventFd();
  if (event < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  return event;
}

int Completion::TryEventFd() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!event_) event_ = Fd(eventfd(settled_ ? 1 : 0, EFD_CLOEXEC | EFD_NONBLOCK));
  return event_.get();
}

bool Completion::Wait(double timeout_s) {
  if (is_settled()) return true;
  pollfd one{.fd = TryEventFd(), .events = POLLIN, .revents = 0};
  if (one.fd < 0) return WaitWithoutFd(timeout_s);
  timespec timeout{};
  double seconds = std::floor(timeout_s);
  timeout.tv_sec = static_cast<time_t>(seconds);
  timeout.tv_nsec = static_cast<long>((timeout_s - seconds) * 1e9);
  ppoll(&one, 1, &timeout, nullptr);
  return is_settled();
}

bool Completion::WaitWithoutFd(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), [this] {
    return settled_.has_value();
  });
}

void Completion::SettleLocked(const Status &status) {
  if (settled_) return;
  settled_ = status;
  --*live_;
  changed_.notify_all();
  if (event_) eventfd_write(event_.get(), 1);
}

}  // namespace ray::rdt
