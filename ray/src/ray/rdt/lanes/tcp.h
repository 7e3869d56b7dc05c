// Network lane: several data connections, opened at the first use and kept. Each requests
// its next chunk when it has received one, so a slow connection takes fewer. Bytes go
// from the producer's memory to the consumer's with no copies but the kernel's.
#pragma once

#include <map>
#include <memory>

#include "ray/rdt/connector.h"
#include "ray/rdt/context.h"
#include "ray/rdt/lanes/lane.h"
#include "ray/rdt/lanes/tcp_stream.h"

namespace ray::rdt {

// The consumer's half. Runs on: the agent's loop; streams on the copy threads.
class TcpLane : public Lane {
 public:
  TcpLane(const Context &context, const Address &peer) : context_(context), peer_(peer) {}
  ~TcpLane() override;

  void Start(std::shared_ptr<Pull> pull,
             const Grant &grant,
             MemoryFiles files,
             Report report) override;

 private:
  struct Stream {
    Loop *loop = nullptr;
    std::shared_ptr<TcpStream> stream;
  };

  void Open();
  void OnOpened(uint64_t id, const Status &status, std::shared_ptr<Channel> channel);
  void OnBroken(uint64_t id);
  void FailWaiting(const Status &why);

  const Context context_;
  const Address peer_;
  const std::shared_ptr<TcpQueue> queue_ = std::make_shared<TcpQueue>();
  uint64_t next_id_ = 0;
  int breaks_ = 0;
  uint64_t received_at_break_ = 0;
  std::map<uint64_t, std::unique_ptr<Connector>> connectors_;
  std::map<uint64_t, Stream> streams_;
  const std::shared_ptr<TcpLane *> alive_ = std::make_shared<TcpLane *>(this);
};

}  // namespace ray::rdt
