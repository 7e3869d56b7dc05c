#include "ray/rdt/lanes/cma.h"

#include "ray/rdt/read_memory.h"

namespace ray::rdt {

std::string ProbeCma(pid_t pid, const PeerInfo &peer) {
  if (pid <= 0) return "the peer's pid cannot be seen from this pid namespace";
  Probe found{};
  SpanList to({{reinterpret_cast<uint64_t>(found.data()), found.size()}});
  SpanList from({{peer.probe_address, found.size()}});
  Status status = ReadMemory(pid, from, to, {0, found.size()});
  if (!status.ok()) return status.text;
  return found == peer.probe
             ? ""
             : "pid " + std::to_string(pid) + " is not the peer's process";
}

void CmaLane::Start(std::shared_ptr<Pull> pull,
                    const Grant &grant,
                    MemoryFiles /*files*/,
                    Report report) {
  auto from = std::make_shared<SpanList>(grant.spans);
  const SpanList *to = &pull->destination;
  CopyRange copy = [pid = pid_, from, to](Range range) {
    return ReadMemory(pid, *from, *to, range);
  };
  StartCopyJob(copies_, std::move(pull), std::move(copy), std::move(report));
}

}  // namespace ray::rdt
