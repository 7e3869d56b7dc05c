// The memory limit of this process's container.
#pragma once

#include <cstdint>
#include <string>

namespace ray::rdt {

// The limit of the control group (cgroup v1 or v2) that the process was in when this
// object was created. Limits of its parents are not read.
//
// Runs on: any thread. Reads two small files.
class MemoryLimit {
 public:
  explicit MemoryLimit(const std::string &groups = "/proc/self/cgroup",
                       const std::string &root = "/sys/fs/cgroup");

  // True if less than 1/16 of the limit would be left after nbytes more. Page cache that
  // the kernel can drop does not count. False without a limit.
  bool IsNear(uint64_t nbytes) const;

 private:
  bool Use(const std::string &folder,
           const char *limit,
           const char *usage,
           const char *cache);

  std::string limit_;  // paths; empty: no limit is known
  std::string usage_;
  std::string stat_;
  std::string cache_;  // the name in stat_ of the page cache that was not used lately
};

}  // namespace ray::rdt
