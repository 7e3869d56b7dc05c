// The producer's half of one data connection: answers READ frames with bytes sent from
// the region's memory.
#pragma once

#include <deque>
#include <memory>

#include "ray/rdt/auth.h"
#include "ray/rdt/fd.h"
#include "ray/rdt/loop.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// Runs on: the copy thread of the loop that it is given. Owned by its watch on that loop,
// so it ends with the connection or the loop.
class TcpSource : public std::enable_shared_from_this<TcpSource> {
 public:
  TcpSource(Loop *loop,
            Fd fd,
            const AgentId &consumer,
            std::shared_ptr<const PinTable> pins)
      : loop_(loop), fd_(std::move(fd)), consumer_(consumer), pins_(std::move(pins)) {}

  void Start();

 private:
  // The answer to one READ. It has its own pin, so the memory stays pinned if the
  // consumer's control connection ends first.
  struct Answer {
    Pin pin;
    Range rest;
    Bytes header;  // the part that is not sent yet
  };

  void OnReady(uint32_t events);
  bool Receive();
  bool OnRead(const FrameHeader &header, ByteView payload);
  bool Send();
  ssize_t SendSome(const Answer &answer);
  void Close();

  Loop *const loop_;
  Fd fd_;
  const AgentId consumer_;
  const std::shared_ptr<const PinTable> pins_;
  Loop::Id watch_ = 0;
  Bytes in_;
  std::deque<Answer> answers_;
};

}  // namespace ray::rdt
