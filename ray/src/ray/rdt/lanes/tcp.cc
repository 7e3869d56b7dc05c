#include "ray/rdt/lanes/tcp.h"

#include <algorithm>
#include <utility>

#include "ray/rdt/limits.h"

namespace ray::rdt {

TcpLane::TcpLane(Loop *loop,
                 CopyPool *copies,
                 const Identity &self,
                 const Address &peer,
                 const TcpOptions &options)
    : loop_(loop), copies_(copies), self_(self), peer_(peer), options_(options) {}

TcpLane::~TcpLane() {
  for (auto &[id, one] : streams_) {
    one.loop->Post([stream = one.stream] { stream->Close(); });
  }
}

void TcpLane::Start(std::shared_ptr<Pull> pull, const Grant &grant, Report report) {
  uint64_t chunk = pull->ChunkFor(options_.max_streams);
  queue_->Add(std::make_shared<TcpJob>(std::move(pull), std::move(report), chunk));
  breaks_ = 0;
  OpenUpTo((grant.total + chunk - 1) / chunk);
  for (auto &[id, one] : streams_) {
    one.loop->Post([stream = one.stream] { stream->Pump(); });
  }
}

void TcpLane::OpenUpTo(size_t wanted) {
  wanted = std::min(wanted, static_cast<size_t>(options_.max_streams));
  while (connectors_.size() + streams_.size() < wanted) Open();
}

void TcpLane::Open() {
  uint64_t id = next_id_++;
  ConnectOptions options{.purpose = Purpose::kData,
                         .over_unix = false,
                         .connect_timeout_s = options_.connect_timeout_s,
                         .peer_timeout_s = options_.peer_timeout_s};
  connectors_[id] = std::make_unique<Connector>(
      loop_,
      self_,
      peer_,
      options,
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
  Loop *loop = copies_->loop(id);
  auto on_broken = [agent_loop = loop_, weak = std::weak_ptr(alive_), id] {
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
