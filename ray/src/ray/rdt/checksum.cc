#include "ray/rdt/checksum.h"

#include <aws/checksums/crc.h>

#include <algorithm>
#include <utility>

namespace ray::rdt {
namespace {

// Continues from the CRC of the bytes before these; 0 at the first.
uint64_t Crc(const void *data, uint64_t nbytes, uint64_t before) {
  // The first call selects the code for this CPU, and must not run on two threads.
  [[maybe_unused]] static const uint64_t of_nothing =
      aws_checksums_crc64nvme(nullptr, 0, 0);
  return aws_checksums_crc64nvme(
      static_cast<const uint8_t *>(data), static_cast<int>(nbytes), before);
}

uint64_t Factor(uint64_t number) { return 2 * number + 1; }

}  // namespace

uint64_t ChecksumOfBlock(const void *data, uint64_t nbytes, uint64_t number) {
  return Crc(data, nbytes, 0) * Factor(number);
}

uint64_t Checksum(const SpanList &memory, Range range) {
  uint64_t sum = 0;
  while (range.nbytes > 0) {
    Range block{range.offset, std::min(kChecksumBlock, range.nbytes)};
    uint64_t crc = 0;
    memory.ForEachPiece(
        block, [&crc](const void *data, size_t nbytes) { crc = Crc(data, nbytes, crc); });
    sum += crc * Factor(block.offset / kChecksumBlock);
    range = {range.offset + block.nbytes, range.nbytes - block.nbytes};
  }
  return sum;
}

bool LazyChecksum::Request(Callback callback) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (checksum_) {
    lock.unlock();
    callback(*checksum_);
    return false;
  }
  waiting_.push_back(std::move(callback));
  return !std::exchange(is_requested_, true);
}

void LazyChecksum::Set(uint64_t checksum) {
  std::vector<Callback> waiting;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    checksum_ = checksum;
    waiting.swap(waiting_);
  }
  for (const Callback &callback : waiting) callback(checksum);
}

}  // namespace ray::rdt
