#include "ray/rdt/lanes/ring.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

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

}  // namespace

std::shared_ptr<RingMemory> RingMemory::Create(uint64_t nbytes, Fd *fd) {
  *fd = Fd(memfd_create("rdt-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  bool is_made = *fd && ftruncate(fd->get(), static_cast<off_t>(nbytes)) == 0 &&
                 fcntl(fd->get(), F_ADD_SEALS, kFixedSize) == 0;
  if (!is_made) return nullptr;
  void *memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd->get(), 0);
  if (memory == MAP_FAILED) return nullptr;
  return std::shared_ptr<RingMemory>(new RingMemory(static_cast<char *>(memory), nbytes));
}

RingMemory::~RingMemory() { munmap(memory_, nbytes_); }

std::shared_ptr<RingFile> RingFile::Open(Fd fd, uint64_t nbytes) {
  if (nbytes == 0 || nbytes > limits::kMaxRing || !IsFixedSize(fd.get(), nbytes))
    return nullptr;
  return std::shared_ptr<RingFile>(new RingFile(std::move(fd), nbytes));
}

Status RingFile::Fill(uint64_t position, const SpanList &memory, Range range) const {
  std::vector<iovec> pieces;
  while (range.nbytes > 0) {
    memory.Slice(range, &pieces);
    ssize_t put = pwritev(fd_.get(),
                          pieces.data(),
                          static_cast<int>(pieces.size()),
                          static_cast<off_t>(position));
    if (put <= 0) {
      return {Code::kIo, WithErrno("the object's memory cannot be read", errno)};
    }
    position += static_cast<uint64_t>(put);
    range.offset += static_cast<uint64_t>(put);
    range.nbytes -= static_cast<uint64_t>(put);
  }
  return {};
}

}  // namespace ray::rdt
