#include "ray/rdt/agent.h"

#include <future>
#include <stdexcept>

#include "ray/rdt/limits.h"
#include "ray/rdt/net.h"
#include "ray/rdt/remote_peer.h"
#include "ray/rdt/self_peer.h"

namespace ray::rdt {
namespace {

Identity MakeIdentity(std::string secret, LaneSet lanes, Probe *probe) {
  Identity identity{.secret = std::move(secret),
                    .lanes = lanes,
                    .probe_address = reinterpret_cast<uint64_t>(probe->data())};
  FillRandom(identity.agent.data(), identity.agent.size());
  FillRandom(identity.probe.data(), identity.probe.size());
  *probe = identity.probe;
  return identity;
}

Address Parsed(ByteView bytes) {
  auto address = ParseAddress(bytes);
  if (!address) throw std::invalid_argument("not an RDT agent's address");
  return *address;
}

// Not a global object: our threads may still run while the process exits.
Status Stopped() { return {Code::kStopped, "this process's RDT agent was stopped"}; }

// A client that knows a pull's id and its consumer can read the pinned region over a data
// connection. So the id has 64 random bits.
uint64_t FreshPullId() {
  uint64_t id = 0;
  FillRandom(&id, sizeof(id));
  return id;
}

constexpr char kTooLong[] = "a call or reply is longer than 64 MiB";

}  // namespace

Agent::Agent(std::string secret, const Settings &settings)
    : settings_(settings),
      log_(&events_),
      pool_(std::make_shared<Pool>(settings.pool_bytes)),
      regions_(&events_),
      probe_(std::make_unique<Probe>()),
      identity_(MakeIdentity(std::move(secret), settings.lanes, probe_.get())),
      self_(DescribeThisProcess(identity_.agent)),
      loop_("rdt-loop"),
      copies_(settings.copy_threads),
      huge_pages_(&copies_),
      files_(settings.pool_bytes, &huge_pages_),
      service_(context_, &regions_) {
  acceptor_ = std::make_unique<Acceptor>(
      context_, [this](std::shared_ptr<Channel> channel, const PeerInfo &peer) {
        service_.AddConnection(std::move(channel), peer);
      });
  acceptor_->ListenOn(ListenUnix(identity_.agent), true);
  self_.ip = settings_.bind_ip;
  if (settings_.clear_tcp) {
    acceptor_->ListenOn(ListenTcp(settings_.bind_ip, &self_.port), false);
  }
  address_bytes_ = Pack(self_);
  peers_[identity_.agent] = std::make_shared<SelfPeer>(context_, &regions_, &service_);
  loop_.After(limits::kTickS, [this] { TickAll(); });
  copies_.Start();
  loop_.Start();
}

Agent::~Agent() { Stop(); }

void Agent::Notify(ByteView address, Notice notice, const Key &key) {
  WithPeer(Parsed(address), [&](const std::shared_ptr<Peer> &peer) {
    if (peer->Queue(notice, key)) loop_.Post([peer] { peer->SendNotices(); });
  });
}

PullTicket Agent::StartPull(ByteView address,
                            const Key &key,
                            const std::vector<Span> &destination,
                            bool with_checksum) {
  Address producer = Parsed(address);
  auto pull = std::make_shared<Pull>(FreshPullId(),
                                     key,
                                     CheckedSpans(destination),
                                     &counters_.pulls_live,
                                     with_checksum);
  PullTicket ticket{.pull = pull};
  Status status = WithPeer(producer, [&](const std::shared_ptr<Peer> &peer) {
    ticket.peer = peer;
    loop_.Post([peer, pull] { peer->Submit(pull); });
  });
  if (!status.ok()) pull->End(status);
  return ticket;
}

void Agent::Cancel(const PullTicket &ticket) {
  if (ticket.pull->is_settled()) return;
  ticket.pull->Cancel();
  loop_.Post([peer = ticket.peer, id = ticket.pull->id] { peer->ForgetPull(id); });
}

void Agent::RecordPull(const std::vector<Span> &spans) {
  SpanList memory = CheckedSpans(spans);
  loop_.Post([this, memory] { huge_pages_.RecordPull(memory, nullptr); });
}

CallTicket Agent::StartCall(ByteView address,
                            Bytes payload,
                            bool is_idempotent,
                            FrameType kind) {
  Address server = Parsed(address);
  auto call =
      std::make_shared<Call>(next_call_++, kind, is_idempotent, &counters_.calls_live);
  CallTicket ticket{.call = call};
  if (payload.size() > limits::kMaxCallPayload) {
    call->End({Code::kRefused, kTooLong});
    return ticket;
  }
  Status status = WithPeer(server, [&](const std::shared_ptr<Peer> &peer) {
    ticket.peer = peer;
    loop_.Post([peer, call, payload = std::move(payload)]() mutable {
      peer->Submit(call, std::move(payload));
    });
  });
  if (!status.ok()) call->End(status);
  return ticket;
}

CallTicket Agent::StartChecksum(ByteView address, const Key &key) {
  return StartCall(
      address, Pack(ChecksumRequest{.key = key}), true, FrameType::kChecksum);
}

void Agent::Cancel(const CallTicket &ticket) {
  if (ticket.call->is_settled()) return;
  ticket.call->End({Code::kCancelled, "the call was cancelled"});
  loop_.Post([peer = ticket.peer, id = ticket.call->id] { peer->ForgetCall(id); });
}

void Agent::Reply(uint64_t call, Bytes payload, bool is_error) {
  if (payload.size() > limits::kMaxCallPayload) {
    is_error = true;
    payload.assign(std::begin(kTooLong), std::end(kTooLong) - 1);
  }
  loop_.Post([this, call, is_error, payload = std::move(payload)]() mutable {
    service_.Reply(call, is_error, std::move(payload));
  });
}

LaneReasons Agent::Explain(ByteView address) {
  LaneReasons reasons;
  Status status = WithPeer(Parsed(address), [&](const std::shared_ptr<Peer> &peer) {
    reasons = peer->Reasons();
  });
  if (!status.ok()) reasons.fill(status.text);
  return reasons;
}

std::map<std::string, int64_t> Agent::Stats() const {
  std::map<std::string, int64_t> stats = {
      {"regions", regions_.size()},
      {"pinned", service_.pins().size()},
      {"pinned_bytes", service_.pins().nbytes()},
      {"pulls_live", counters_.pulls_live},
      {"calls_live", counters_.calls_live},
      {"connections", counters_.connections},
      {"bytes_granted", counters_.bytes_granted},
      {"pool_used", pool_->used_bytes()},
      {"pool_free", pool_->free_bytes()},
      {"pooled_bytes", pool_->used_bytes() + pool_->free_bytes()},
      {"files_free", files_.free_bytes()},
  };
  for (size_t i = 0; i < kLaneCount; ++i) {
    stats[std::string("pulls_") + kLaneNames[i]] =
        static_cast<int64_t>(counters_.lanes[i].pulls);
    stats[std::string("bytes_in_") + kLaneNames[i]] =
        static_cast<int64_t>(counters_.lanes[i].bytes_in);
  }
  return stats;
}

void Agent::Stop() {
  std::lock_guard<std::mutex> one_at_a_time(stop_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (is_stopped_) return;
    is_stopped_ = true;
  }
  // Tasks posted before is_stopped_ was set run before this one.
  std::promise<void> closed;
  loop_.Post([this, &closed] {
    acceptor_.reset();
    service_.Shutdown();
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto &[id, peer] : peers_) peer->Shutdown(Stopped());
    closed.set_value();
  });
  closed.get_future().wait();
  context_.mailbox->Close();
  loop_.Stop();
  copies_.Stop();
  regions_.ReleaseAll();
  events_.Push({.kind = Event::Kind::kStopped});
}

void Agent::TickAll() {
  loop_.After(limits::kTickS, [this] { TickAll(); });
  double idle_s = memory_limit_.IsNear(0) ? 0 : limits::kPoolIdleS;
  pool_->Trim(idle_s);
  files_.Trim(idle_s);
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto &[id, peer] : peers_) peer->Tick();
  // If the map holds the only reference, no other thread is about to use the peer.
  std::erase_if(peers_, [](const auto &entry) {
    return entry.second.use_count() == 1 && entry.second->is_idle();
  });
}

// Under the lock, so that tasks that `use` posts run before the one that Stop posts.
Status Agent::WithPeer(const Address &address, const UsePeer &use) {
  if (address.version != kProtocolVersion) {
    return {Code::kVersion, VersionMismatchText(address.version)};
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_stopped_) return Stopped();
  std::shared_ptr<Peer> &peer = peers_[address.agent];
  if (!peer) peer = std::make_shared<RemotePeer>(context_, address);
  use(peer);
  return {};
}

}  // namespace ray::rdt
