#include "ray/rdt/lanes/ring.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

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
  return is_made ? Open(fd->get(), nbytes) : nullptr;
}

std::shared_ptr<RingMemory> RingMemory::Open(int fd, uint64_t nbytes) {
  if (nbytes == 0 || nbytes > kMaxBytes || !IsFixedSize(fd, nbytes)) return nullptr;
  void *memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return nullptr;
  return std::shared_ptr<RingMemory>(new RingMemory(static_cast<char *>(memory), nbytes));
}

RingMemory::~RingMemory() { munmap(memory_, nbytes_); }

}  // namespace ray::rdt
