#include "ray/rdt/checksum_job.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "ray/rdt/limits.h"
#include "ray/rdt/read_memory.h"

namespace ray::rdt {
namespace {

// Shared by the steps of one region.
class ChecksumJob {
 public:
  explicit ChecksumJob(Pin pin) : pin_(std::move(pin)) {}

  // Processes one chunk. True if there may be more.
  bool Step() {
    uint64_t total = pin_->memory.total();
    uint64_t offset = next_.fetch_add(limits::kMaxChunk);
    if (offset >= total) return false;
    uint64_t nbytes = std::min(limits::kMaxChunk, total - offset);
    sum_ += ChecksumOf({offset, nbytes});
    if (done_.fetch_add(nbytes) + nbytes == total) pin_->checksum.Set(sum_);
    return true;
  }

 private:
  static_assert(limits::kMaxChunk % kChecksumBlock == 0);

  // Blocks that cannot be read are left out: a pull of them fails with the reason.
  uint64_t ChecksumOf(Range range) const {
    uint64_t sum = 0;
    std::vector<char> bytes(std::min(kChecksumBlock, range.nbytes));
    while (range.nbytes > 0) {
      Range block{range.offset, std::min(kChecksumBlock, range.nbytes)};
      if (ReadOwnMemory(pin_->memory, block, bytes.data()).ok()) {
        sum += ChecksumOfBlock(bytes.data(), block.nbytes, block.offset / kChecksumBlock);
      }
      range = {range.offset + block.nbytes, range.nbytes - block.nbytes};
    }
    return sum;
  }

  const Pin pin_;
  std::atomic<uint64_t> next_{0};
  std::atomic<uint64_t> done_{0};
  std::atomic<uint64_t> sum_{0};
};

}  // namespace

void StartChecksum(CopyPool *copies, Pin pin) {
  if (pin->memory.total() == 0) return pin->checksum.Set(0);
  auto job = std::make_shared<ChecksumJob>(std::move(pin));
  copies->Add([job] { return job->Step(); }, copies->threads());
}

}  // namespace ray::rdt
