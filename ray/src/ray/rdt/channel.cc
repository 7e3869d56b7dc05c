#include "ray/rdt/channel.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>

namespace ray::rdt {

void Channel::Start(Handler *handler) {
  handler_ = handler;
  // Weak: an event may be pending when the last owner releases the channel.
  watch_ = loop_->Watch(fd_.get(), EPOLLIN, [weak = weak_from_this()](uint32_t events) {
    if (auto self = weak.lock()) self->OnReady(events);
  });
  if (watch_ != 0) return;
  // Posted: callers do not expect OnClosed during Start.
  loop_->Post([weak = weak_from_this(), text = WithErrno("cannot be watched", errno)] {
    if (auto self = weak.lock()) self->Fail(Code::kIo, text);
  });
}

void Channel::Send(Bytes frame, Fd attached) {
  if (!fd_) return;
  out_.push_back({.frame = std::move(frame), .attached = std::move(attached)});
  if (out_.size() == 1) Flush();
}

void Channel::Close() {
  handler_ = nullptr;
  if (!fd_) return;
  loop_->Unwatch(watch_);
  // A forked child may hold the descriptor as well; shutdown ends the connection for
  // both.
  shutdown(fd_.get(), SHUT_RDWR);
  fd_.Reset();
}

Fd Channel::Release() {
  handler_ = nullptr;
  loop_->Unwatch(watch_);
  Fd fd = std::move(fd_);
  bool is_clean = begin_ == end_ && out_.empty();
  return is_clean ? std::move(fd) : Fd();
}

void Channel::OnReady(uint32_t events) {
  if (events & EPOLLOUT) Flush();
  if (!(events & ~EPOLLOUT)) return;
  bool has_more = true;
  for (int i = 0; i < limits::kReadsPerTurn && fd_ && has_more; ++i) {
    if (!Receive(&has_more)) return;
    Dispatch();
  }
}

// False if no bytes are available or the channel failed. After a short read there are no
// more, or the loop reports them again.
bool Channel::Receive(bool *has_more) {
  ReserveInput(NextReadBytes());
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  iovec piece{in_.data() + end_, in_.size() - end_};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t got = recvmsg(fd_.get(), &message, MSG_CMSG_CLOEXEC);
  if (got > 0) {
    end_ += static_cast<size_t>(got);
    *has_more = static_cast<size_t>(got) == piece.iov_len;
    TakeDescriptors(&message);
    return true;
  }
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  Fail(Code::kPeerLost,
       got == 0 ? "the peer closed the connection"
                : WithErrno("the connection broke", errno));
  return false;
}

// The rest of a large frame, or kReadBytes.
size_t Channel::NextReadBytes() const {
  if (end_ - begin_ < kHeaderBytes) return limits::kReadBytes;
  size_t whole = kHeaderBytes + DecodeHeader(in_.data() + begin_).length;
  size_t have = end_ - begin_;
  return std::max(limits::kReadBytes, whole > have ? whole - have : 0);
}

void Channel::ReserveInput(size_t nbytes) {
  if (begin_ == end_) {
    begin_ = end_ = 0;
    if (in_.size() > limits::kMaxKeptInput) Bytes().swap(in_);
  }
  if (in_.size() - end_ >= nbytes) return;
  if (begin_ > 0) std::memmove(in_.data(), in_.data() + begin_, end_ - begin_);
  end_ -= begin_;
  begin_ = 0;
  if (in_.size() - end_ < nbytes) in_.resize(end_ + nbytes);
}

void Channel::Dispatch() {
  while (fd_ && end_ - begin_ >= kHeaderBytes) {
    FrameHeader header = DecodeHeader(in_.data() + begin_);
    if (header.magic != kMagic) return Fail(Code::kRefused, "bytes that are not a frame");
    if (header.length > max_frame_)
      return Fail(Code::kRefused, "a frame over the size limit");
    if (attached_.size() > limits::kMaxAttachedFds)
      return Fail(Code::kRefused, "descriptors that no frame announces");
    if (end_ - begin_ < kHeaderBytes + header.length) return;
    ByteView payload(in_.data() + begin_ + kHeaderBytes, header.length);
    begin_ += kHeaderBytes + header.length;
    handler_->OnFrame(header, payload, &attached_);
  }
}

void Channel::TakeDescriptors(msghdr *message) {
  for (cmsghdr *c = CMSG_FIRSTHDR(message); c != nullptr; c = CMSG_NXTHDR(message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
      attached_.emplace_back(fd);
    }
  }
}

// False if the socket accepts no more bytes. After an error nothing is sent any more;
// Receive gets the same error, or the end of the stream, and reports it.
bool Channel::SendFirst() {
  Outgoing &first = out_.front();
  iovec piece{first.frame.data() + first.sent, first.frame.size() - first.sent};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (first.attached) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr *c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    int fd = first.attached.get();
    std::memcpy(CMSG_DATA(c), &fd, sizeof(fd));
  }
  ssize_t sent = sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
  if (sent < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (sent < 0) {
    out_.clear();
    return false;
  }
  first.attached.Reset();
  first.sent += static_cast<size_t>(sent);
  if (first.sent == first.frame.size()) out_.pop_front();
  return true;
}

void Channel::Flush() {
  while (!out_.empty() && SendFirst()) {
  }
  if (is_blocked_ == !out_.empty()) return;
  is_blocked_ = !out_.empty();
  loop_->Rearm(watch_, is_blocked_ ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

void Channel::Fail(Code code, const std::string &text) {
  Handler *handler = handler_;
  Close();
  if (handler != nullptr) handler->OnClosed({code, text});
}

}  // namespace ray::rdt
