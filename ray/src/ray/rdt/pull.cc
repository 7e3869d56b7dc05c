#include "ray/rdt/pull.h"

#include <algorithm>

#include "ray/rdt/limits.h"

namespace ray::rdt {

uint64_t Pull::attempt() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return attempt_;
}

uint64_t Pull::received_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return received_;
}

uint64_t Pull::checksum() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return sum_;
}

bool Pull::TakeRange(uint64_t attempt, uint64_t max_bytes, Range *range) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (ending_ || attempt != attempt_) return false;
  if (returned_.empty()) {
    *range = {next_, std::min(max_bytes, destination.total() - next_)};
    next_ += range->nbytes;
  } else {
    Range &first = returned_.front();
    *range = {first.offset, std::min(max_bytes, first.nbytes)};
    first = {first.offset + range->nbytes, first.nbytes - range->nbytes};
    if (first.nbytes == 0) returned_.pop_front();
  }
  if (range->nbytes > 0) taken_[range->offset] = range->nbytes;
  return range->nbytes > 0;
}

void Pull::ReturnRange(uint64_t attempt, Range range) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (attempt == attempt_ && taken_.erase(range.offset) > 0) returned_.push_back(range);
}

bool Pull::BeginWrite(uint64_t attempt) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (ending_ || attempt != attempt_) return false;
  ++writers_;
  return true;
}

void Pull::EndWrite() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (--writers_ > 0) return;
  changed_.notify_all();
  if (ending_) SettleLocked(*ending_);
}

Status Pull::Fill(Range range,
                  const std::function<Status(Range part)> &copy,
                  uint64_t *sum) const {
  if (!with_checksum) return copy(range);
  while (range.nbytes > 0) {
    Range block{range.offset, std::min(kChecksumBlock, range.nbytes)};
    if (Status status = copy(block); !status.ok()) return status;
    *sum += Checksum(destination, block);
    range = {range.offset + block.nbytes, range.nbytes - block.nbytes};
  }
  return {};
}

bool Pull::CompleteRange(uint64_t attempt, Range range, uint64_t sum) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (attempt != attempt_ || taken_.erase(range.offset) == 0) return false;
  received_ += range.nbytes;
  sum_ += sum;
  return received_ == destination.total();
}

void Pull::Resume() {
  std::unique_lock<std::mutex> lock(mutex_);
  EndAttemptLocked(&lock);
  for (auto [offset, nbytes] : taken_) returned_.push_back({offset, nbytes});
  taken_.clear();
}

void Pull::Restart() {
  std::unique_lock<std::mutex> lock(mutex_);
  EndAttemptLocked(&lock);
  next_ = received_ = 0;
  sum_ = 0;
  returned_.clear();
  taken_.clear();
}

void Pull::EndAttemptLocked(std::unique_lock<std::mutex> *lock) {
  ++attempt_;
  changed_.wait(*lock, [this] { return writers_ == 0; });
}

Status Pull::CheckTotal(uint64_t producer_total) const {
  if (producer_total == destination.total()) return {};
  return {Code::kSizeMismatch,
          "the object has " + std::to_string(producer_total) +
              " bytes, the destination " + std::to_string(destination.total())};
}

static_assert(limits::kMinChunk % kChecksumBlock == 0, "every chunk begins at a block");

uint64_t Pull::ChunkFor(int workers) const {
  uint64_t fair = destination.total() / (2 * static_cast<uint64_t>(workers)) + 1;
  uint64_t whole = (fair + kChecksumBlock - 1) / kChecksumBlock * kChecksumBlock;
  return std::clamp(whole, limits::kMinChunk, limits::kMaxChunk);
}

void Pull::Cancel() {
  End({Code::kCancelled, "the pull was cancelled"});
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return settled_.has_value(); });
}

void Pull::End(const Status &status) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!ending_) ending_ = status;
  if (writers_ == 0) SettleLocked(*ending_);
}

void Call::Answer(bool is_error, Bytes payload) {
  if (is_error)
    return Fail({Code::kRefused, std::string(payload.begin(), payload.end())});
  std::lock_guard<std::mutex> lock(mutex_);
  if (settled_) return;
  reply_ = std::move(payload);
  SettleLocked({});
}

void Call::Fail(const Status &status) {
  std::lock_guard<std::mutex> lock(mutex_);
  SettleLocked(status);
}

Bytes Call::TakeReply() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::move(reply_);
}

}  // namespace ray::rdt
