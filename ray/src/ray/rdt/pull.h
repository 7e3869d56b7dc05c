// Results that callers wait for: of transfers to this process, and of calls.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>

#include "ray/rdt/checksum.h"
#include "ray/rdt/fd.h"
#include "ray/rdt/lanes/lane_kind.h"
#include "ray/rdt/spans.h"
#include "ray/rdt/status.h"
#include "ray/rdt/wire.h"

namespace ray::rdt {

// Runs on: any thread. Settles exactly once. `live` counts those that have not settled.
class Completion {
 public:
  explicit Completion(std::atomic<int64_t> *live) : live_(live) { ++*live_; }
  virtual ~Completion() = default;

  bool is_settled() const;
  // Settles, unless it has settled before.
  virtual void End(const Status &status);
  // Ok until settled.
  Status status() const;
  // Becomes readable when the completion settles. Created at the first call, so that
  // thousands of pulls do not need thousands of descriptors.
  int EventFd();
  // True if settled within timeout_s. Returns early when a signal arrives, unless no
  // descriptor is left.
  bool Wait(double timeout_s);

 protected:
  // Caller holds mutex_.
  void SettleLocked(const Status &status);

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // for waits on native threads
  std::optional<Status> settled_;    // guarded by mutex_

 private:
  int TryEventFd();  // -1 with errno set

  std::atomic<int64_t> *const live_;
  Fd event_;  // guarded by mutex_
};

// Copies one range into a pull's destination.
using CopyRange = std::function<Status(Range range)>;

// One transfer of an object: its destination, which ranges are missing, and how many
// threads write at the moment.
//
// Runs on: any thread. The caller owns the destination memory and may free it once the
// pull has settled: then no thread writes to it.
//
// A lane calls TakeRange and then Receive. A lane whose bytes arrive in parts calls
// BeginWrite and EndWrite around each write to the destination; then CompleteRange, or
// ReturnRange if the bytes will not arrive.
//
// Each start of a lane with the pull is an attempt. Calls of an earlier attempt have no
// effect: its ranges are fetched again.
class Pull : public Completion {
 public:
  Pull(uint64_t id,
       const Key &key,
       SpanList destination,
       std::atomic<int64_t> *live,
       bool with_checksum = false)
      : Completion(live),
        id(id),
        key(key),
        destination(std::move(destination)),
        with_checksum(with_checksum) {}

  const uint64_t id;
  const Key key;
  const SpanList destination;
  const bool with_checksum;  // compute the checksum of the received bytes

  uint64_t attempt() const;
  // Returns a range of up to max_bytes that was not taken yet. False if none is left, or
  // the pull or the attempt has ended.
  bool TakeRange(uint64_t attempt, uint64_t max_bytes, Range *range);
  void ReturnRange(uint64_t attempt, Range range);
  // False if the pull or the attempt has ended: then the destination must not be written
  // to.
  bool BeginWrite(uint64_t attempt);
  void EndWrite();
  // Counts the range as received, and adds its checksum. True for the one call that
  // completes the destination.
  bool CompleteRange(uint64_t attempt, Range range, uint64_t sum);
  // Copies and completes a range. The status is that of `copy`.
  Status Receive(uint64_t attempt, Range range, const CopyRange &copy, bool *is_whole);
  // Ends the attempt once its writers have finished their chunks. The next attempt
  // fetches the missing ranges.
  void Resume();
  // Like Resume, but the next attempt fetches everything.
  void Restart();
  uint64_t received_bytes() const;
  bool is_whole() const { return received_bytes() == destination.total(); }

  // Ok, or kSizeMismatch with both sizes.
  Status CheckTotal(uint64_t producer_total) const;
  // The checksum of the destination, once it is complete; see checksum.h.
  uint64_t checksum() const;
  // The size of a chunk, in whole checksum blocks, that shares this pull evenly among
  // `workers`.
  uint64_t ChunkFor(int workers) const;

  // Settles once the last writer has finished. Only the first result counts.
  void End(const Status &status) override;
  // Ends with kCancelled, and waits until it settled.
  void Cancel();

  void set_lane(LaneKind lane) { lane_ = static_cast<int>(lane); }
  int lane() const { return lane_; }  // -1 until chosen

 private:
  Status Fill(Range range, const CopyRange &copy, uint64_t *sum) const;
  void EndAttemptLocked(std::unique_lock<std::mutex> *lock);

  std::optional<Status> ending_;  // guarded by mutex_, as is all below
  int writers_ = 0;
  uint64_t attempt_ = 0;
  uint64_t next_ = 0;  // no byte from here on was taken
  std::deque<Range> returned_;
  std::map<uint64_t, uint64_t> taken_;  // sizes by offset; neither received nor returned
  uint64_t received_ = 0;
  uint64_t sum_ = 0;  // the checksum of what was received
  std::atomic<int> lane_{-1};
};

// A request to another agent, or to the Python code of its process.
class Call : public Completion {
 public:
  // `kind` is kCall, or kChecksum for a request that the agent answers itself. If the
  // connection breaks, an idempotent call is sent again, so it may reach the peer twice.
  Call(uint64_t id, FrameType kind, bool is_idempotent, std::atomic<int64_t> *live)
      : Completion(live), id(id), kind(kind), is_idempotent(is_idempotent) {}
  const uint64_t id;
  const FrameType kind;
  const bool is_idempotent;

  // An error reply settles with kRefused and the payload as text.
  void Answer(bool is_error, Bytes payload);
  Bytes TakeReply();

 private:
  Bytes reply_;  // guarded by mutex_
};

}  // namespace ray::rdt
