#include "ray/rdt/lanes/tcp.h"

#include <algorithm>
#include <utility>

#include "ray/rdt/limits.h"

namespace ray::rdt {

TcpLane::~TcpLane() {
  for (auto &[id, one] : streams_) {
    one.loop->Post([stream = one.stream] { stream->Close(); });
  }
}

void TcpLane::Start(std::shared_ptr<Pull> pull,
                    const Grant &grant,
                    MemoryFiles /*files*/,
                    Report report) {
  uint64_t most = static_cast<uint64_t>(context_.settings->tcp_streams);
  uint64_t chunk = pull->ChunkFor(context_.settings->tcp_streams);
  queue_->Add(std::make_shared<LaneJob>(std::move(pull), std::move(report), chunk));
  breaks_ = 0;
  uint64_t wanted = std::min((grant.total + chunk - 1) / chunk, most);
  while (connectors_.size() + streams_.size() < wanted) Open();
  for (auto &[id, one] : streams_) {
    one.loop->Post([stream = one.stream] { stream->Pump(); });
  }
}

void TcpLane::Open() {
  uint64_t id = next_id_++;
  connectors_[id] = std::make_unique<Connector>(
      context_,
      peer_,
      Purpose::kData,
      [this, id](const Status &status,
                 std::shared_ptr<Channel> channel,
                 const PeerInfo &) { OnOpened(id, status, std::move(channel)); });
}

void TcpLane::OnOpened(uint64_t id,
                       const Status &status,
                       std::shared_ptr<Channel> channel) {
  connectors_.erase(id);
  Fd fd = status.ok() ? channel->Release() : Fd();
  if (!fd) {
    // Other streams, if there are any, transfer the bytes.
    if (!streams_.empty() || !connectors_.empty()) return;
    return FailWaiting(
        status.ok() ? Status{Code::kIo, "the producer sent unexpected bytes"} : status);
  }
  Loop *loop = context_.copies->loop(id);
  auto on_broken = [agent_loop = context_.loop, weak = std::weak_ptr(alive_), id] {
    agent_loop->Post([weak, id] {
      if (auto lane = weak.lock()) (*lane)->OnBroken(id);
    });
  };
  auto stream = std::make_shared<TcpStream>(loop, std::move(fd), queue_, on_broken);
  streams_[id] = {loop, stream};
  loop->Post([stream] { stream->Start(); });
}

void TcpLane::OnBroken(uint64_t id) {
  streams_.erase(id);
  if (queue_->is_empty()) return;  // idle; the next pull opens another
  uint64_t received = queue_->received_ranges();
  if (std::exchange(received_at_break_, received) != received) breaks_ = 0;
  if (++breaks_ <= limits::kMaxStreamBreaks) {
    Open();
  } else if (streams_.empty() && connectors_.empty()) {
    FailWaiting({Code::kIo, "the data connections broke repeatedly"});
  }
  for (auto &[other, one] : streams_) {
    one.loop->Post([stream = one.stream] { stream->Pump(); });
  }
}

void TcpLane::FailWaiting(const Status &why) {
  for (const auto &job : queue_->TakeAll()) job->ReportOnce(why);
}

}  // namespace ray::rdt
