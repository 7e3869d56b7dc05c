#include "ray/rdt/pull.h"

#include <poll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <system_error>

#include "ray/rdt/limits.h"

namespace ray::rdt {

bool Completion::is_settled() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return settled_.has_value();
}

void Completion::End(const Status &status) {
  std::lock_guard<std::mutex> lock(mutex_);
  SettleLocked(status);
}

Status Completion::status() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return settled_.value_or(Status{});
}

int Completion::EventFd() {
  int event = TryEventFd();
  if (event < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  return event;
}

int Completion::TryEventFd() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!event_) event_ = Fd(eventfd(settled_ ? 1 : 0, EFD_CLOEXEC | EFD_NONBLOCK));
  return event_.get();
}

bool Completion::Wait(double timeout_s) {
  if (is_settled()) return true;
  pollfd one{.fd = TryEventFd(), .events = POLLIN, .revents = 0};
  if (one.fd < 0) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), [this] {
      return settled_.has_value();
    });
  }
  timespec timeout{};
  double seconds = std::floor(timeout_s);
  timeout.tv_sec = static_cast<time_t>(seconds);
  timeout.tv_nsec = static_cast<long>((timeout_s - seconds) * 1e9);
  ppoll(&one, 1, &timeout, nullptr);
  return is_settled();
}

void Completion::SettleLocked(const Status &status) {
  if (settled_) return;
  settled_ = status;
  --*live_;
  changed_.notify_all();
  if (event_) eventfd_write(event_.get(), 1);
}

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

Status Pull::Receive(uint64_t attempt,
                     Range range,
                     const CopyRange &copy,
                     bool *is_whole) {
  *is_whole = false;
  if (!BeginWrite(attempt)) return {};
  uint64_t sum = 0;
  Status status = Fill(range, copy, &sum);
  EndWrite();
  if (status.ok()) *is_whole = CompleteRange(attempt, range, sum);
  return status;
}

// With a checksum, copies block by block: each is in the cache then.
Status Pull::Fill(Range range, const CopyRange &copy, uint64_t *sum) const {
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
  next_ = received_ = sum_ = 0;
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
  if (is_error) return End({Code::kRefused, std::string(payload.begin(), payload.end())});
  std::lock_guard<std::mutex> lock(mutex_);
  if (settled_) return;
  reply_ = std::move(payload);
  SettleLocked({});
}

Bytes Call::TakeReply() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::move(reply_);
}

}  // namespace ray::rdt
