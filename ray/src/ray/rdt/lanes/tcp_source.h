// The producer's half of one data connection: answers READ frames with bytes
// straight from the region's memory.
#pragma once

#include <deque>
#include <memory>

#include "ray/rdt/auth.h"
#include "ray/rdt/fd.h"
#include "ray/rdt/loop.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// Runs on: the copy thread whose loop it was given. Owned by its watch on that
// loop, and so ends with the connection or with the loop.
class TcpSource : public std::enable_shared_from_this<TcpSource> {
 public:
  TcpSource(Loop *loop,
            Fd fd,
            const AgentId &consumer,
            std::shared_ptr<const PinTable> pins);

  void Start();

 private:
  // One READ. Holds the pin itself, so the memory stays even if the consumer's
  // control connection ends first.
  struct Answer {
    Pin pin;
    Range rest;
    Bytes header;  // of it, what is not sent yet
  };

  void OnReady(uint32_t events);
  bool Receive();
  bool OnRead(const FrameHeader &header, ByteView payload);
  bool Send();
  ssize_t SendSome(const Answer &answer);
  void Rearm();
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
