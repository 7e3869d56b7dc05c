#include "ray/rdt/fork_count.h"

#include <pthread.h>

#include <atomic>

namespace ray::rdt {
namespace {

std::atomic<uint64_t> g_forks{0};

void CountFork() { ++g_forks; }

}  // namespace

uint64_t ForkCount() {
  static const int registered = pthread_atfork(CountFork, nullptr, nullptr);
  static_cast<void>(registered);
  return g_forks;
}

}  // namespace ray::rdt
