#include "ray/rdt/read_memory.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>

#include "ray/rdt/fd.h"

namespace ray::rdt {
namespace {

// True for an errno that means that the system forbids the call, not this one read.
bool IsForbidden(int error) {
  return error == EPERM || error == ENOSYS || error == EACCES;
}

// Reads `range` of `from` to the same range of `to`, with as many calls of `read` as
// necessary. Each returns the number of bytes read, or -1 and errno.
template <typename ReadSome>
int ReadAll(const SpanList &from, const SpanList &to, Range range, ReadSome read) {
  std::vector<iovec> local;
  std::vector<iovec> remote;
  while (range.nbytes > 0) {
    to.Slice(range, &local);
    from.Slice(range, &remote);
    ssize_t got = read(local, remote);
    if (got <= 0) return got == 0 ? EFAULT : errno;
    range.offset += static_cast<uint64_t>(got);
    range.nbytes -= static_cast<uint64_t>(got);
  }
  return 0;
}

// A function that reads with process_vm_readv(2).
auto Attached(pid_t pid) {
  return [pid](const std::vector<iovec> &local, const std::vector<iovec> &remote) {
    return process_vm_readv(
        pid, local.data(), local.size(), remote.data(), remote.size(), 0);
  };
}

// A function that reads this process's memory as a file, for systems that forbid
// process_vm_readv. The file is opened for each use, so a forked child opens its own.
auto AsFile(const Fd &file) {
  return [&file](const std::vector<iovec> &local, const std::vector<iovec> &remote) {
    size_t nbytes = std::min(local[0].iov_len, remote[0].iov_len);
    if (!file) {  // both are forbidden: only a plain copy is left
      std::memcpy(local[0].iov_base, remote[0].iov_base, nbytes);
      return static_cast<ssize_t>(nbytes);
    }
    return pread(file.get(),
                 local[0].iov_base,
                 nbytes,
                 static_cast<off_t>(reinterpret_cast<uintptr_t>(remote[0].iov_base)));
  };
}

}  // namespace

Status ReadMemory(pid_t pid, const SpanList &from, const SpanList &to, Range range) {
  int error = ReadAll(from, to, range, Attached(pid));
  if (error == 0) return {};
  std::string text = WithErrno("process_vm_readv from pid " + std::to_string(pid), error);
  if (IsForbidden(error)) return {Code::kRefused, text};
  return {error == ESRCH ? Code::kPeerLost : Code::kIo, text};
}

Status ReadOwnMemory(const SpanList &from, const SpanList &to, Range range) {
  static std::atomic<bool> is_forbidden{false};
  int error = is_forbidden ? EPERM : ReadAll(from, to, range, Attached(getpid()));
  if (IsForbidden(error)) {
    is_forbidden = true;
    Fd file(open("/proc/self/mem", O_RDONLY | O_CLOEXEC));
    error = ReadAll(from, to, range, AsFile(file));
  }
  if (error == 0) return {};
  return {Code::kIo, WithErrno("the object's memory cannot be read", error)};
}

Status ReadOwnMemory(const SpanList &from, Range range, void *to) {
  // A span whose byte at range.offset is the buffer's first.
  uint64_t address = reinterpret_cast<uint64_t>(to) - range.offset;
  return ReadOwnMemory(from, SpanList({{address, range.offset + range.nbytes}}), range);
}

}  // namespace ray::rdt
