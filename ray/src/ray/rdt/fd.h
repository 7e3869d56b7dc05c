// A file descriptor with one owner.
#pragma once

#include <deque>
#include <utility>

namespace ray::rdt {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd &operator=(Fd &&other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  Fd(const Fd &) = delete;
  Fd &operator=(const Fd &) = delete;
  ~Fd() { Reset(); }

  // Makes forked children close it. Otherwise a connection stays up as long as any child
  // of a process that has exited.
  void CloseInChildren();

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void Reset();

 private:
  int fd_ = -1;
};

using Fds = std::deque<Fd>;

}  // namespace ray::rdt
