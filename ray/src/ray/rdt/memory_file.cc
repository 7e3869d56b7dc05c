#include "ray/rdt/memory_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "ray/rdt/limits.h"

namespace ray::rdt {
namespace {

constexpr int kFixedSize = F_SEAL_SHRINK | F_SEAL_GROW;

bool IsFixedSize(int fd, uint64_t nbytes) {
  struct stat status{};
  int seals = fcntl(fd, F_GET_SEALS);
  return seals >= 0 && (seals & kFixedSize) == kFixedSize && fstat(fd, &status) == 0 &&
         static_cast<uint64_t>(status.st_size) == nbytes;
}

// Repeats `transfer`, preadv(2) or pwritev(2), for all of the range.
template <typename Transfer>
Status TransferAll(
    Transfer transfer, int fd, uint64_t position, const SpanList &memory, Range range) {
  std::vector<iovec> pieces;
  while (range.nbytes > 0) {
    memory.Slice(range, &pieces);
    ssize_t done = transfer(
        fd, pieces.data(), static_cast<int>(pieces.size()), static_cast<off_t>(position));
    if (done <= 0) {
      return {Code::kIo, WithErrno("the object's memory cannot be read", errno)};
    }
    position += static_cast<uint64_t>(done);
    range.offset += static_cast<uint64_t>(done);
    range.nbytes -= static_cast<uint64_t>(done);
  }
  return {};
}

}  // namespace

std::shared_ptr<MemoryFile> MemoryFile::Create(uint64_t nbytes) {
  Fd fd(memfd_create("rdt", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  bool is_made = fd && ftruncate(fd.get(), static_cast<off_t>(nbytes)) == 0 &&
                 fcntl(fd.get(), F_ADD_SEALS, kFixedSize) == 0;
  if (!is_made) return nullptr;
  return std::shared_ptr<MemoryFile>(new MemoryFile(std::move(fd), nbytes));
}

std::shared_ptr<MemoryFile> MemoryFile::Open(Fd fd, uint64_t nbytes) {
  if (nbytes == 0 || !IsFixedSize(fd.get(), nbytes)) return nullptr;
  return std::shared_ptr<MemoryFile>(new MemoryFile(std::move(fd), nbytes));
}

Status MemoryFile::Write(uint64_t position, const SpanList &memory, Range range) const {
  return TransferAll(pwritev, fd_.get(), position, memory, range);
}

Status MemoryFile::Read(uint64_t position, const SpanList &memory, Range range) const {
  return TransferAll(preadv, fd_.get(), position, memory, range);
}

void *MemoryFile::Map(void *at, uint64_t nbytes, int flags, uint64_t position) const {
  return mmap(
      at, nbytes, PROT_READ | PROT_WRITE, flags, fd_.get(), static_cast<off_t>(position));
}

bool MemoryFile::SealWrites() const {
  return fcntl(fd_.get(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == 0;
}

bool IsUnwritten(const Span &mapped) {
  constexpr uint64_t kPresent = 1ULL << 63, kSwapped = 1ULL << 62, kInFile = 1ULL << 61;
  Fd pages(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pages) return false;
  std::vector<uint64_t> entries(limits::kPagesAtOnce);
  uint64_t page = mapped.address / limits::kPage;
  uint64_t end = (mapped.address + mapped.nbytes + limits::kPage - 1) / limits::kPage;
  while (page < end) {
    size_t count = std::min<uint64_t>(entries.size(), end - page);
    ssize_t done = pread(pages.get(),
                         entries.data(),
                         count * sizeof(uint64_t),
                         static_cast<off_t>(page * sizeof(uint64_t)));
    if (done != static_cast<ssize_t>(count * sizeof(uint64_t))) return false;
    auto is_own = [](uint64_t entry) {
      return (entry & (kPresent | kSwapped)) != 0 && (entry & kInFile) == 0;
    };
    if (std::any_of(entries.begin(), entries.begin() + count, is_own)) return false;
    page += count;
  }
  return true;
}

Fd MemoryFile::Duplicate() const { return Fd(fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0)); }

}  // namespace ray::rdt
