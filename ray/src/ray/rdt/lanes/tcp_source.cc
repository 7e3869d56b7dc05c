#include "ray/rdt/lanes/tcp_source.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "ray/rdt/limits.h"

namespace ray::rdt {
void TcpSource::Start() {
  watch_ = loop_->Watch(fd_.get(), EPOLLIN, [self = shared_from_this()](uint32_t events) {
    self->OnReady(events);
  });
  if (watch_ == 0) Close();
}

void TcpSource::OnReady(uint32_t events) {
  bool is_up = !(events & ~EPOLLOUT) || Receive();
  if (!is_up || !Send()) return Close();
  loop_->Rearm(watch_, answers_.empty() ? EPOLLIN : EPOLLIN | EPOLLOUT);
}

// False if the connection ended or the consumer violates the protocol.
bool TcpSource::Receive() {
  constexpr size_t kReadFrame = kHeaderBytes + 2 * sizeof(uint64_t);
  std::array<uint8_t, limits::kRequestBytes> buffer;
  ssize_t got = recv(fd_.get(), buffer.data(), buffer.size(), 0);
  if (got <= 0) return got < 0 && (errno == EAGAIN || errno == EINTR);
  in_.insert(in_.end(), buffer.begin(), buffer.begin() + got);
  size_t at = 0;
  for (; in_.size() - at >= kReadFrame; at += kReadFrame) {
    ByteView payload(in_.data() + at + kHeaderBytes, kReadFrame - kHeaderBytes);
    if (!OnRead(DecodeHeader(in_.data() + at), payload)) return false;
  }
  in_.erase(in_.begin(), in_.begin() + static_cast<ptrdiff_t>(at));
  return true;
}

bool TcpSource::OnRead(const FrameHeader &header, ByteView payload) {
  auto read = Unpack<Read>(payload);
  bool is_valid = read && header.magic == kMagic && header.version == kProtocolVersion &&
                  header.type == FrameType::kRead && header.length == payload.size() &&
                  answers_.size() < limits::kMaxQueuedReads;
  if (!is_valid) return false;
  Pin pin = pins_->Find(consumer_, header.request);
  uint64_t total = pin ? pin->memory.total() : 0;
  bool has_range = read->nbytes <= total && read->offset <= total - read->nbytes;
  FrameHeader data{.type = FrameType::kData,
                   .length = has_range ? read->nbytes : 0,
                   .request = header.request};
  Bytes encoded(kHeaderBytes);
  std::memcpy(encoded.data(), &data, kHeaderBytes);
  answers_.push_back({std::move(pin), {read->offset, data.length}, std::move(encoded)});
  return true;
}

// False if the connection broke.
bool TcpSource::Send() {
  uint64_t budget = limits::kStreamBytesPerTurn;
  while (!answers_.empty() && budget > 0) {
    Answer &first = answers_.front();
    ssize_t sent = SendSome(first);
    if (sent < 0) return errno == EAGAIN || errno == EINTR;
    uint64_t left = static_cast<uint64_t>(sent);
    budget -= std::min(budget, left);
    size_t of_header = std::min<uint64_t>(left, first.header.size());
    first.header.erase(first.header.begin(),
                       first.header.begin() + static_cast<ptrdiff_t>(of_header));
    left -= of_header;
    first.rest = {first.rest.offset + left, first.rest.nbytes - left};
    if (first.header.empty() && first.rest.nbytes == 0) answers_.pop_front();
  }
  return true;
}

ssize_t TcpSource::SendSome(const Answer &answer) {
  std::vector<iovec> pieces;
  if (answer.rest.nbytes > 0) {
    Range turn{answer.rest.offset,
               std::min(answer.rest.nbytes, limits::kStreamBytesPerTurn)};
    answer.pin->memory.Slice(turn, &pieces);
  }
  if (!answer.header.empty()) {
    if (pieces.size() == SpanList::kMaxIovecs) pieces.pop_back();
    auto *header = const_cast<uint8_t *>(answer.header.data());
    pieces.insert(pieces.begin(), {header, answer.header.size()});
  }
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = pieces.size();
  return sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
}

void TcpSource::Close() {
  loop_->Unwatch(watch_);
  fd_.Reset();
  answers_.clear();
}

}  // namespace ray::rdt
