// The consumer's half of one data connection.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

#include "ray/rdt/fd.h"
#include "ray/rdt/lanes/lane.h"
#include "ray/rdt/loop.h"

namespace ray::rdt {

// A range of a pull that one stream has requested.
struct TcpRead {
  std::shared_ptr<LaneJob> job;
  Range range;
};

// The pulls of all streams to one peer, which take a chunk of each in turn.
// Runs on: any thread.
class TcpQueue {
 public:
  void Add(std::shared_ptr<LaneJob> job);
  bool Next(TcpRead *read);
  // Returns a range that will not arrive over the stream that took it.
  void Return(const TcpRead &read);
  // Counts a range as received. True if that completes its pull.
  bool Complete(const TcpRead &read, uint64_t sum);
  bool is_empty() const;
  // The number of ranges received so far.
  uint64_t received_ranges() const { return received_; }
  // Removes and returns all jobs with ranges left to take.
  std::deque<std::shared_ptr<LaneJob>> TakeAll();

 private:
  mutable std::mutex mutex_;
  std::deque<std::shared_ptr<LaneJob>> jobs_;  // guarded by mutex_
  std::atomic<uint64_t> received_{0};
};

// Runs on: the copy thread of the loop that it is given. Owned by its watch on that loop
// until Close.
class TcpStream : public std::enable_shared_from_this<TcpStream> {
 public:
  // Called at most once, on the copy thread, after all requested ranges were returned to
  // the queue.
  using OnBroken = std::function<void()>;

  TcpStream(Loop *loop, Fd fd, std::shared_ptr<TcpQueue> queue, OnBroken on_broken)
      : loop_(loop),
        fd_(std::move(fd)),
        queue_(std::move(queue)),
        on_broken_(std::move(on_broken)) {}

  void Start();
  // Takes work from the queue.
  void Pump();
  // Does not call OnBroken.
  void Close();

 private:
  void OnReady(uint32_t events);
  void Flush();
  bool Receive(uint64_t *budget);
  ssize_t ReceiveBody(uint64_t budget);
  ssize_t Discard(uint64_t nbytes);
  void ChecksumUpTo(uint64_t nbytes);
  bool OnHeader();
  void OnBody(uint64_t nbytes);
  void Break();

  Loop *const loop_;
  Fd fd_;
  const std::shared_ptr<TcpQueue> queue_;
  OnBroken on_broken_;
  Loop::Id watch_ = 0;
  std::deque<TcpRead> requested_;  // in the order of their answers
  Bytes out_;                      // READ frames not yet sent
  FrameHeader header_;
  size_t header_bytes_ = 0;         // of header_ received
  uint64_t body_bytes_ = 0;         // of the first of requested_ received
  uint64_t checksummed_bytes_ = 0;  // of these, in body_checksum_
  uint64_t body_checksum_ = 0;
};

}  // namespace ray::rdt
