#include "ray/rdt/memory_limit.h"

#include <fstream>
#include <optional>
#include <sstream>

namespace ray::rdt {
namespace {

// Empty if the file does not begin with a number: "max" is no limit.
std::optional<uint64_t> ReadNumber(const std::string &path) {
  uint64_t number = 0;
  std::ifstream file(path);
  if (file >> number) return number;
  return {};
}

uint64_t ReadField(const std::string &path, const std::string &name) {
  std::ifstream file(path);
  std::string field;
  for (uint64_t value = 0; file >> field >> value;) {
    if (field == name) return value;
  }
  return 0;
}

}  // namespace

MemoryLimit::MemoryLimit(const std::string &groups, const std::string &root) {
  std::ifstream file(groups);
  // Each line is "number:controllers:path"; with cgroup v2 there are no controllers.
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string number, controllers, path;
    std::getline(fields, number, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    bool is_memory = ("," + controllers + ",").find(",memory,") != std::string::npos;
    // In a container the path may be the host's: then the root is the container's.
    for (const std::string &group : {path, std::string()}) {
      if (is_memory && Use(root + "/memory" + group,
                           "/memory.limit_in_bytes",
                           "/memory.usage_in_bytes",
                           "total_inactive_file")) {
        return;
      }
      if (controllers.empty() &&
          Use(root + group, "/memory.max", "/memory.current", "inactive_file")) {
        return;
      }
    }
  }
}

bool MemoryLimit::IsNear(uint64_t nbytes) const {
  std::optional<uint64_t> limit, usage;
  if (!limit_.empty()) limit = ReadNumber(limit_);
  if (limit) usage = ReadNumber(usage_);
  if (!usage) return false;
  uint64_t cache = ReadField(stat_, cache_);
  uint64_t used = *usage > cache ? *usage - cache : 0;
  uint64_t most = *limit - *limit / 16;
  return used > most || nbytes > most - used;
}

bool MemoryLimit::Use(const std::string &folder,
                      const char *limit,
                      const char *usage,
                      const char *cache) {
  if (!ReadNumber(folder + usage)) return false;
  limit_ = folder + limit;
  usage_ = folder + usage;
  stat_ = folder + "/memory.stat";
  cache_ = cache;
  return true;
}

}  // namespace ray::rdt
