// Frames over one non-blocking stream socket.
#pragma once

#include <sys/socket.h>

#include <deque>
#include <memory>

#include "ray/rdt/limits.h"
#include "ray/rdt/loop.h"
#include "ray/rdt/status.h"
#include "ray/rdt/wire.h"

namespace ray::rdt {

// Runs on: the loop that it is given. Owns its socket. A handler may close the channel,
// or pass it to another handler, in its callbacks.
class Channel : public std::enable_shared_from_this<Channel> {
 public:
  class Handler {
   public:
    virtual ~Handler() = default;
    // `payload` is valid during the call. `attached` begins with the descriptors that the
    // frame carries; the handler takes these.
    virtual void OnFrame(const FrameHeader &header, ByteView payload, Fds *attached) = 0;
    // Called at most once, and never after Close or Release.
    virtual void OnClosed(const Status &why) = 0;
  };

  Channel(Loop *loop, Fd fd) : loop_(loop), fd_(std::move(fd)) {}
  ~Channel() { Close(); }

  void Start(Handler *handler);
  void set_handler(Handler *handler) { handler_ = handler; }
  void set_max_frame(uint64_t nbytes) { max_frame_ = nbytes; }
  int fd() const { return fd_.get(); }

  // The queue has no limit: callers send small frames, or data of their own user.
  void Send(Bytes frame, Fd attached = {});
  void Close();
  // Returns the socket for use on another thread. Empty if unexpected bytes were
  // received.
  Fd Release();

 private:
  struct Outgoing {
    Bytes frame;
    size_t sent = 0;
    Fd attached;
  };

  void OnReady(uint32_t events);
  bool Receive(bool *has_more);
  size_t NextReadBytes() const;
  void ReserveInput(size_t nbytes);
  void Dispatch();
  void TakeDescriptors(msghdr *message);
  bool SendFirst();
  void Flush();
  void Fail(Code code, const std::string &text);

  Loop *const loop_;
  Fd fd_;
  Handler *handler_ = nullptr;
  Loop::Id watch_ = 0;
  uint64_t max_frame_ = limits::kMaxFrameBeforeAuth;
  Bytes in_;  // received and not dispatched: [begin_, end_)
  size_t begin_ = 0;
  size_t end_ = 0;
  Fds attached_;  // received, and not taken by a handler
  std::deque<Outgoing> out_;
  bool is_blocked_ = false;  // out_ waits for the socket to take more
};

}  // namespace ray::rdt
