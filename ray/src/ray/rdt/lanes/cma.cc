#include "ray/rdt/lanes/cma.h"

#include <sys/uio.h>

#include <cerrno>

namespace ray::rdt {
namespace {

// What the system says when it forbids the call as such, not this one read.
bool IsForbidden(int error) {
  return error == EPERM || error == ENOSYS || error == EACCES;
}

Status FailedRead(pid_t pid, int error) {
  std::string text = WithErrno("process_vm_readv from pid " + std::to_string(pid), error);
  if (IsForbidden(error)) return {Code::kRefused, text};
  return {error == ESRCH ? Code::kPeerLost : Code::kIo, text};
}

Status ReadMemory(pid_t pid, const SpanList &from, const SpanList &to, Range range) {
  std::vector<iovec> local;
  std::vector<iovec> remote;
  while (range.nbytes > 0) {
    to.Slice(range, &local);
    from.Slice(range, &remote);
    ssize_t got = process_vm_readv(
        pid, local.data(), local.size(), remote.data(), remote.size(), 0);
    if (got <= 0) return FailedRead(pid, got == 0 ? EFAULT : errno);
    range.offset += static_cast<uint64_t>(got);
    range.nbytes -= static_cast<uint64_t>(got);
  }
  return {};
}

}  // namespace

std::string ProbeCma(pid_t pid, const PeerFacts &peer) {
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

void CmaLane::Start(std::shared_ptr<Pull> pull, const Grant &grant, Report report) {
  auto from = std::make_shared<SpanList>(grant.spans);
  const SpanList *to = &pull->destination;
  CopyRange copy = [pid = pid_, from, to](Range range) {
    return ReadMemory(pid, *from, *to, range);
  };
  StartCopyJob(copies_, std::move(pull), std::move(copy), std::move(report));
}

}  // namespace ray::rdt
