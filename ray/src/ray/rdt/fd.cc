#include "ray/rdt/fd.h"

#include <pthread.h>
#include <unistd.h>

#include <array>
#include <atomic>

#include "ray/rdt/limits.h"

namespace ray::rdt {
namespace {

// A plain array of flags: a forked child may neither lock nor allocate.
std::array<std::atomic<bool>, limits::kMaxTrackedFd> g_close_in_children{};

void CloseMarked() {
  for (int fd = 0; fd < limits::kMaxTrackedFd; ++fd) {
    if (g_close_in_children[fd].exchange(false, std::memory_order_relaxed)) close(fd);
  }
}

void Mark(int fd, bool is_marked) {
  if (fd < limits::kMaxTrackedFd)
    g_close_in_children[fd].store(is_marked, std::memory_order_relaxed);
}

}  // namespace

void Fd::CloseInChildren() {
  static const int registered = pthread_atfork(nullptr, nullptr, CloseMarked);
  static_cast<void>(registered);
  if (fd_ >= 0) Mark(fd_, true);
}

void Fd::Reset() {
  if (fd_ < 0) return;
  Mark(fd_, false);
  close(std::exchange(fd_, -1));
}

}  // namespace ray::rdt
