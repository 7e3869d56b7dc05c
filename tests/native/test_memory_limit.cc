#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "fixtures.h"
#include "ray/rdt/memory_limit.h"

namespace fixtures {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMiB = 1 << 20;

// Files as the kernel shows them.
class Groups {
 public:
  Groups() : root_(fs::temp_directory_path() / "rdt-XXXXXX") {
    std::string name = root_.string();
    CHECK(mkdtemp(name.data()) != nullptr);
    root_ = name;
  }
  ~Groups() { fs::remove_all(root_); }

  void Write(const std::string &path, const std::string &text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text << "\n";
  }
  MemoryLimit Limit() const { return MemoryLimit(root_ / "cgroup", root_); }

 private:
  fs::path root_;
};

TEST("memory limit: without the cache, less than a sixteenth is left") {
  for (bool is_v2 : {true, false}) {
    Groups groups;
    groups.Write("cgroup", is_v2 ? "0::/pod" : "5:cpu:/\n4:hugetlb,memory:/pod\n0::/");
    std::string folder = is_v2 ? "pod/" : "memory/pod/";
    std::string limit = is_v2 ? "memory.max" : "memory.limit_in_bytes";
    groups.Write(folder + limit, std::to_string(160 * kMiB));
    groups.Write(folder + (is_v2 ? "memory.current" : "memory.usage_in_bytes"),
                 std::to_string(140 * kMiB));
    groups.Write(folder + "memory.stat",
                 "anon 5\ninactive_file " + std::to_string(40 * kMiB) +
                     "\ntotal_inactive_file " + std::to_string(40 * kMiB));
    MemoryLimit found = groups.Limit();
    CHECK(!found.IsNear(50 * kMiB));
    CHECK(found.IsNear(51 * kMiB));
    CHECK(found.IsNear(~0ULL));
    groups.Write(folder + limit, std::to_string(100 * kMiB));
    CHECK(found.IsNear(0));
    groups.Write(folder + limit, "max");
    CHECK(!found.IsNear(~0ULL));
  }
}

TEST("memory limit: a container sees its own group as the root") {
  Groups groups;
  groups.Write("cgroup", "0::/kubepods/pod7");
  groups.Write("memory.max", "1000");
  groups.Write("memory.current", "990");
  CHECK(groups.Limit().IsNear(1));
}

TEST("memory limit: none without control groups") {
  Groups groups;
  CHECK(!groups.Limit().IsNear(~0ULL));
  groups.Write("cgroup", "0::/");
  CHECK(!groups.Limit().IsNear(~0ULL));
}

TEST("memory limit: near the limit, the receive pool returns what it does not use") {
  Groups groups;
  groups.Write("cgroup", "0::/");
  groups.Write("memory.max", std::to_string(160 * kMiB));
  groups.Write("memory.current", std::to_string(10 * kMiB));
  Pool pool(100 * kMiB, groups.Limit());
  pool.Free(pool.Allocate(8 * kMiB), 8 * kMiB);
  void *used = pool.Allocate(4 * kMiB);
  CHECK_EQ(pool.free_bytes(), 8 * kMiB);
  groups.Write("memory.current", std::to_string(149 * kMiB));
  void *more = pool.Allocate(3 * kMiB);
  CHECK_EQ(pool.free_bytes(), 0U);
  for (auto [memory, nbytes] : {std::pair(used, 4 * kMiB), std::pair(more, 3 * kMiB)}) {
    pool.Free(memory, nbytes);
  }
}

}  // namespace
}  // namespace fixtures
