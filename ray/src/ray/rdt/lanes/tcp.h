// Network lane: several data connections, opened at the first use and kept. Each requests
// its next chunk when it has received one, so a slow connection takes fewer. Bytes go
// from the producer's memory to the consumer's with no copies but the kernel's.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ray/rdt/address.h"
#include "ray/rdt/connector.h"
#include "ray/rdt/copy_pool.h"
#include "ray/rdt/lanes/lane.h"
#include "ray/rdt/lanes/tcp_stream.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

struct TcpOptions {
  int max_streams = 4;
  double connect_timeout_s = 10;
  double peer_timeout_s = 30;
};

// The consumer's half. Runs on: the agent's loop; streams on the copy threads.
class TcpLane : public Lane {
 public:
  TcpLane(Loop *loop,
          CopyPool *copies,
          const Identity &self,
          const Address &peer,
          const TcpOptions &options);
  ~TcpLane() override;

  void Start(std::shared_ptr<Pull> pull, const Grant &grant, Report report) override;

 private:
  struct Stream {
    Loop *loop = nullptr;
    std::shared_ptr<TcpStream> stream;
  };

  void OpenUpTo(size_t wanted);
  void Open();
  void OnOpened(uint64_t id, const Status &status, std::shared_ptr<Channel> channel);
  void OnBroken(uint64_t id);
  void FailWaiting(const Status &why);

  Loop *const loop_;
  CopyPool *const copies_;
  const Identity self_;
  const Address peer_;
  const TcpOptions options_;
  const std::shared_ptr<TcpQueue> queue_ = std::make_shared<TcpQueue>();
  uint64_t next_id_ = 0;
  int breaks_ = 0;
  uint64_t received_at_break_ = 0;
  std::map<uint64_t, std::unique_ptr<Connector>> connectors_;
  std::map<uint64_t, Stream> streams_;
  const std::shared_ptr<TcpLane *> alive_ = std::make_shared<TcpLane *>(this);
};

}  // namespace ray::rdt
