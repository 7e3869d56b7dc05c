#include <cstring>
#include <thread>

#include "check.h"
#include "ray/rdt/pool.h"

namespace ray::rdt {
namespace {

constexpr size_t kMiB = 1 << 20;

TEST("pool: memory is aligned, for huge pages where it is large") {
  Pool pool(0);
  for (size_t nbytes :
       {size_t{0}, size_t{1}, size_t{65}, size_t{5000}, kMiB, 3 * kMiB + 1}) {
    void *memory = pool.Allocate(nbytes);
    std::memset(memory, 1, nbytes);
    size_t alignment = nbytes >= kMiB ? Pool::kHugePage : 64;
    CHECK_EQ(reinterpret_cast<uintptr_t>(memory) % alignment, 0u);
    pool.Free(memory, nbytes);
  }
}

TEST("pool: a large block is at most 5 % larger than asked for") {
  for (size_t nbytes = kMiB; nbytes < 300 * kMiB; nbytes += nbytes / 7 + 4097) {
    CHECK(Pool::ClassOf(nbytes) >= nbytes);
    CHECK(Pool::ClassOf(nbytes) <= nbytes + nbytes / 20);
  }
}

TEST("pool: the block freed last is the next one given out") {
  Pool pool(64 * kMiB);
  void *a = pool.Allocate(4 * kMiB);
  void *b = pool.Allocate(4 * kMiB);
  pool.Free(a, 4 * kMiB);
  pool.Free(b, 4 * kMiB);
  CHECK(pool.Allocate(4 * kMiB) == b);
  CHECK(pool.Allocate(4 * kMiB) == a);
  pool.Free(a, 4 * kMiB);
  pool.Free(b, 4 * kMiB);
}

TEST("pool: free memory stays under the cap, the oldest goes first") {
  Pool pool(8 * kMiB);
  void *old = pool.Allocate(4 * kMiB);
  void *young = pool.Allocate(6 * kMiB);
  CHECK_EQ(pool.used_bytes(), 10 * kMiB);
  pool.Free(old, 4 * kMiB);
  pool.Free(young, 6 * kMiB);
  CHECK_EQ(pool.free_bytes(), 6 * kMiB);
  CHECK_EQ(pool.used_bytes(), 0u);
  CHECK(pool.Allocate(6 * kMiB) == young);
  pool.Free(young, 6 * kMiB);
  void *huge = pool.Allocate(9 * kMiB);
  pool.Free(huge, 9 * kMiB);
  CHECK(pool.free_bytes() <= 8 * kMiB);
}

TEST("pool: trim gives back what was idle") {
  Pool pool(64 * kMiB);
  pool.Free(pool.Allocate(2 * kMiB), 2 * kMiB);
  pool.Free(pool.Allocate(100), 100);
  pool.Trim(3600);
  CHECK_EQ(pool.free_bytes(), 2 * kMiB + 128);
  pool.Trim(0);
  CHECK_EQ(pool.free_bytes(), 0u);
}

TEST("pool: what is kept for later goes before memory runs out") {
  Pool pool(64 << 20);
  pool.Free(pool.Allocate(8 << 20), 8 << 20);
  CHECK(pool.free_bytes() > 0);
  bool has_thrown = false;
  try {
    pool.Allocate(size_t{1} << 60);
  } catch (const std::bad_alloc &) {
    has_thrown = true;
  }
  CHECK(has_thrown);
  CHECK_EQ(pool.free_bytes(), 0u);
  CHECK_EQ(pool.used_bytes(), 0u);
}

TEST("pool: many threads share it") {
  Pool pool(16 * kMiB);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&pool, t] {
      for (size_t i = 0; i < 500; ++i) {
        size_t nbytes = (i * 7919 + t) % (2 * kMiB) + 1;
        auto *memory = static_cast<char *>(pool.Allocate(nbytes));
        memory[0] = memory[nbytes - 1] = 1;
        pool.Free(memory, nbytes);
      }
    });
  }
  for (auto &thread : threads) thread.join();
  CHECK_EQ(pool.used_bytes(), 0u);
}

}  // namespace
}  // namespace ray::rdt
