#include "ray/rdt/lanes/tcp_stream.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "ray/rdt/limits.h"

namespace ray::rdt {

void TcpQueue::Add(std::shared_ptr<LaneJob> job) {
  std::lock_guard<std::mutex> lock(mutex_);
  jobs_.push_back(std::move(job));
}

bool TcpQueue::Next(TcpRead *read) {
  std::lock_guard<std::mutex> lock(mutex_);
  while (!jobs_.empty()) {
    read->job = std::move(jobs_.front());
    jobs_.pop_front();
    if (read->job->TakeRange(&read->range)) {
      jobs_.push_back(read->job);
      return true;
    }
  }
  return false;
}

void TcpQueue::Return(const TcpRead &read) {
  read.job->pull->ReturnRange(read.job->attempt, read.range);
  std::lock_guard<std::mutex> lock(mutex_);
  bool is_queued = std::find(jobs_.begin(), jobs_.end(), read.job) != jobs_.end();
  if (!is_queued) jobs_.push_back(read.job);
}

bool TcpQueue::Complete(const TcpRead &read, uint64_t sum) {
  ++received_;
  return read.job->pull->CompleteRange(read.job->attempt, read.range, sum);
}

bool TcpQueue::is_empty() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return jobs_.empty();
}

std::deque<std::shared_ptr<LaneJob>> TcpQueue::TakeAll() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(jobs_, {});
}

void TcpStream::Start() {
  watch_ = loop_->Watch(fd_.get(), EPOLLIN, [self = shared_from_this()](uint32_t events) {
    self->OnReady(events);
  });
  if (watch_ == 0) return Break();
  Pump();
}

void TcpStream::Pump() {
  TcpRead read;
  while (fd_ && requested_.size() < limits::kReadsAhead && queue_->Next(&read)) {
    Read message{.offset = read.range.offset, .nbytes = read.range.nbytes};
    Bytes frame = EncodeFrame(FrameType::kRead, read.job->pull->id, message);
    out_.insert(out_.end(), frame.begin(), frame.end());
    requested_.push_back(std::move(read));
  }
  if (fd_ && !out_.empty()) Flush();
}

void TcpStream::Close() {
  if (!fd_) return;
  loop_->Unwatch(watch_);
  fd_.Reset();
  on_broken_ = nullptr;
}

void TcpStream::OnReady(uint32_t events) {
  if (events & EPOLLOUT) Flush();
  uint64_t budget = limits::kStreamBytesPerTurn;
  while (fd_ && (events & ~EPOLLOUT) && budget > 0 && Receive(&budget)) {
  }
}

void TcpStream::Flush() {
  ssize_t sent = send(fd_.get(), out_.data(), out_.size(), MSG_NOSIGNAL);
  if (sent < 0 && errno != EAGAIN && errno != EINTR) return Break();
  if (sent > 0) out_.erase(out_.begin(), out_.begin() + sent);
  loop_->Rearm(watch_, out_.empty() ? EPOLLIN : EPOLLIN | EPOLLOUT);
}

// False if no bytes are available or the stream broke.
bool TcpStream::Receive(uint64_t *budget) {
  bool in_header = header_bytes_ < kHeaderBytes;
  char *header = reinterpret_cast<char *>(&header_) + header_bytes_;
  ssize_t got = in_header ? recv(fd_.get(), header, kHeaderBytes - header_bytes_, 0)
                          : ReceiveBody(*budget);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (got <= 0) {
    Break();
    return false;
  }
  *budget -= std::min<uint64_t>(*budget, static_cast<uint64_t>(got));
  if (!in_header) {
    OnBody(static_cast<uint64_t>(got));
    return true;
  }
  header_bytes_ += static_cast<size_t>(got);
  if (header_bytes_ < kHeaderBytes || OnHeader()) return true;
  Break();
  return false;
}

ssize_t TcpStream::ReceiveBody(uint64_t budget) {
  const TcpRead &read = requested_.front();
  Range rest{read.range.offset + body_bytes_,
             std::min(budget, read.range.nbytes - body_bytes_)};
  Pull &pull = *read.job->pull;
  if (!pull.BeginWrite(read.job->attempt)) return Discard(rest.nbytes);
  std::vector<iovec> pieces;
  pull.destination.Slice(rest, &pieces);
  ssize_t got = readv(fd_.get(), pieces.data(), static_cast<int>(pieces.size()));
  int error = errno;
  if (got > 0 && pull.with_checksum)
    ChecksumUpTo(body_bytes_ + static_cast<uint64_t>(got));
  pull.EndWrite();
  errno = error;
  return got;
}

// Adds the complete blocks. If the stream breaks, the whole range is requested again, so
// the sum counts for the pull only once the range is complete.
void TcpStream::ChecksumUpTo(uint64_t nbytes) {
  const TcpRead &read = requested_.front();
  bool is_whole = nbytes == read.range.nbytes;
  uint64_t end = is_whole ? nbytes : nbytes / kChecksumBlock * kChecksumBlock;
  body_checksum_ +=
      Checksum(read.job->pull->destination,
               {read.range.offset + checksummed_bytes_, end - checksummed_bytes_});
  checksummed_bytes_ = end;
}

// Receives bytes of a pull that has ended: they were requested before.
ssize_t TcpStream::Discard(uint64_t nbytes) {
  std::array<char, limits::kDiscardBytes> unused;
  return recv(fd_.get(), unused.data(), std::min<uint64_t>(nbytes, unused.size()), 0);
}

// False if the producer violates the protocol.
bool TcpStream::OnHeader() {
  if (header_.magic != kMagic || header_.version != kProtocolVersion ||
      header_.type != FrameType::kData || requested_.empty()) {
    return false;
  }
  const TcpRead &first = requested_.front();
  if (header_.request != first.job->pull->id) return false;
  if (header_.length == first.range.nbytes) return true;
  if (header_.length != 0) return false;
  first.job->ReportOnce({Code::kIo, "the producer no longer has the object"});
  requested_.pop_front();
  header_bytes_ = 0;
  Pump();
  return true;
}

void TcpStream::OnBody(uint64_t nbytes) {
  body_bytes_ += nbytes;
  if (body_bytes_ < requested_.front().range.nbytes) return;
  TcpRead done = std::move(requested_.front());
  requested_.pop_front();
  header_bytes_ = 0;
  body_bytes_ = checksummed_bytes_ = 0;
  if (queue_->Complete(done, std::exchange(body_checksum_, 0))) done.job->ReportOnce({});
  Pump();
}

void TcpStream::Break() {
  auto self = shared_from_this();  // Close drops the watch that owns it
  OnBroken on_broken = std::move(on_broken_);
  Close();
  for (const TcpRead &read : requested_) queue_->Return(read);
  requested_.clear();
  if (on_broken) on_broken();
}

}  // namespace ray::rdt
