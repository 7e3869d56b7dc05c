// One consumer fetching one RDT object: the destination, what of it is still to
// be fetched, and who writes to it at the moment.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <map>

#include "ray/rdt/checksum.h"
#include "ray/rdt/completion.h"
#include "ray/rdt/lanes/lane_kind.h"
#include "ray/rdt/spans.h"
#include "ray/rdt/wire.h"

namespace ray::rdt {

// Runs on: any thread. The destination memory belongs to the caller, who may
// free it once the pull has settled: no writer is inside it then.
//
// A lane moves bytes so: TakeRange; then, around each write to the destination,
// BeginWrite and EndWrite; then Landed, or ReturnRange if the bytes will not come.
//
// Each time a lane is started with the pull is an attempt. What lanes of earlier
// attempts still say is passed over: their ranges are fetched again.
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
  const bool with_checksum;  // whoever asked wants to verify it

  uint64_t attempt() const;
  // Hands out up to max_bytes that nobody has taken. False when nothing is left
  // to take, or the pull or the attempt has ended.
  bool TakeRange(uint64_t attempt, uint64_t max_bytes, Range *range);
  void ReturnRange(uint64_t attempt, Range range);
  // False when the pull or the attempt has ended: then the destination must not
  // be touched.
  bool BeginWrite(uint64_t attempt);
  void EndWrite();
  // Between BeginWrite and EndWrite: has `copy` fill the range. Where the pull is
  // summed up it does so block by block, and adds their checksums to `sum`.
  Status Fill(Range range,
              const std::function<Status(Range part)> &copy,
              uint64_t *sum) const;
  // What has landed counts, its checksum with it. True for the one call that makes
  // the destination whole.
  bool CompleteRange(uint64_t attempt, Range range, uint64_t sum = 0);
  // Ends the attempt, once its writers have left (each is done with its chunk
  // soon): the next one fetches what has not landed.
  void Resume();
  // As Resume, and the next one fetches everything.
  void Restart();
  uint64_t received_bytes() const;
  bool is_whole() const { return received_bytes() == destination.total(); }

  // Ok, or kSizeMismatch with both lengths.
  Status CheckTotal(uint64_t producer_total) const;
  // The checksum of the destination, once all is there; see checksum.h.
  uint64_t checksum() const;
  // The chunk that splits this pull fairly over `workers`, in whole blocks.
  uint64_t ChunkFor(int workers) const;

  void Complete() { End({}); }
  // Settles once the last writer has left; what came first counts.
  void Fail(const Status &status) { End(status); }
  // Fail with kCancelled, and wait until it settled.
  void Cancel();

  void set_lane(LaneKind lane) { lane_ = static_cast<int>(lane); }
  int lane() const { return lane_; }  // -1 until chosen

 private:
  void End(const Status &status);

  void EndAttemptLocked(std::unique_lock<std::mutex> *lock);

  std::optional<Status> ending_;  // guarded by mutex_, as is all below
  int writers_ = 0;
  uint64_t attempt_ = 0;
  uint64_t next_ = 0;  // nothing from here on was ever taken
  std::deque<Range> returned_;
  std::map<uint64_t, uint64_t> taken_;  // lengths by offset; not landed, not returned
  uint64_t received_ = 0;
  uint64_t sum_ = 0;  // of what has landed
  std::atomic<int> lane_{-1};
};

// A request to another agent or its Python side.
class Call : public Completion {
 public:
  // `kind` is kCall, or kSum for a request that the agent itself answers. One that
  // `repeats` may reach the other side twice: it is sent again over a new connection.
  Call(uint64_t id, FrameType kind, bool is_idempotent, std::atomic<int64_t> *live)
      : Completion(live), id(id), kind(kind), is_idempotent(is_idempotent) {}
  const uint64_t id;
  const FrameType kind;
  const bool is_idempotent;

  // An error reply settles as kRefused with the payload as text.
  void Answer(bool is_error, Bytes payload);
  void Fail(const Status &status);
  Bytes TakeReply();

 private:
  Bytes reply_;  // guarded by mutex_
};

}  // namespace ray::rdt
