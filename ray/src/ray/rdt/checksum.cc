#include "ray/rdt/checksum.h"

#include <algorithm>
#include <utility>

#include "ray/rdt/xxh3.h"

namespace ray::rdt {
namespace {

uint64_t HashBlock(const SpanList &memory, Range block, uint64_t number) {
  std::vector<iovec> pieces;
  if (memory.Slice(block, &pieces) == block.nbytes && pieces.size() == 1) {
    return Xxh3(pieces[0].iov_base, block.nbytes, number);
  }
  std::vector<char> gathered(block.nbytes);
  memory.CopyOut(block, gathered.data());
  return Xxh3(gathered.data(), gathered.size(), number);
}

}  // namespace

uint64_t Checksum(const SpanList &memory, Range range) {
  uint64_t sum = 0;
  while (range.nbytes > 0) {
    Range block{range.offset, std::min(kChecksumBlock, range.nbytes)};
    sum += HashBlock(memory, block, range.offset / kChecksumBlock);
    range = {range.offset + block.nbytes, range.nbytes - block.nbytes};
  }
  return sum;
}

bool LazyNumber::Ask(Told told) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (number_) {
    lock.unlock();
    told(*number_);
    return false;
  }
  waiting_.push_back(std::move(told));
  return !std::exchange(is_asked_, true);
}

void LazyNumber::Set(uint64_t number) {
  std::vector<Told> waiting;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    number_ = number;
    waiting.swap(waiting_);
  }
  for (const Told &told : waiting) told(number);
}

}  // namespace ray::rdt
