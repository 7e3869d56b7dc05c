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
  Identity identity;
  FillRandom(identity.agent.data(), identity.agent.size());
  FillRandom(probe->data(), probe->size());
  identity.secret = std::move(secret);
  identity.lanes = lanes;
  identity.probe = *probe;
  identity.probe_address = reinterpret_cast<uint64_t>(probe->data());
  return identity;
}

SpanList CheckedSpans(const std::vector<Span> &spans) {
  uint64_t total = 0;
  if (!TotalOf(spans, &total))
    throw std::invalid_argument("spans overflow the address space");
  return SpanList(spans);
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
      service_(context_, &regions_) {
  Open();
  address_bytes_ = Pack(self_);
  auto self = std::make_shared<SelfPeer>(context_, &regions_, &service_);
  peers_[identity_.agent] = std::move(self);
  loop_.After(limits::kTickS, [this] { TickAll(); });
  copies_.Start();
  loop_.Start();
}

Agent::~Agent() { Stop(); }

// Clear-text TCP that may not be used is not listened on either.
void Agent::Open() {
  acceptor_ = std::make_unique<Acceptor>(
      &loop_,
      identity_,
      &log_,
      [this](std::shared_ptr<Channel> channel, const PeerInfo &peer) {
        service_.AddConnection(std::move(channel), peer);
      });
  acceptor_->ListenOn(ListenUnix(identity_.agent), true, settings_.peer_timeout_s);
  self_.ip = settings_.bind_ip;
  if (settings_.clear_tcp) {
    acceptor_->ListenOn(
        ListenTcp(settings_.bind_ip, &self_.port), false, settings_.peer_timeout_s);
  }
}

bool Agent::Register(const Key &key,
                     const std::vector<Span> &spans,
                     int64_t token,
                     std::vector<Guard> guards) {
  CheckedSpans(spans);
  return regions_.Register(key, spans, token, std::move(guards));
}

bool Agent::Release(const Key &key) { return regions_.Release(key); }

void Agent::Notify(ByteView address, Notice notice, const Key &key) {
  WithPeer(address, [&](const std::shared_ptr<Peer> &peer) {
    if (peer->Queue(notice, key)) loop_.Post([peer] { peer->SendNotices(); });
  });
}

PullTicket Agent::StartPull(ByteView address,
                            const Key &key,
                            const std::vector<Span> &destination,
                            bool with_checksum) {
  PullTicket ticket;
  SpanList spans = CheckedSpans(destination);
  Status status = WithPeer(address, [&](const std::shared_ptr<Peer> &peer) {
    ticket = {
        std::make_shared<Pull>(
            FreshPullId(), key, std::move(spans), &counters_.pulls_live, with_checksum),
        peer};
    loop_.Post([peer, pull = ticket.pull] { peer->Submit(pull); });
  });
  if (status.ok()) return ticket;
  ticket.pull = std::make_shared<Pull>(0, key, SpanList(), &counters_.pulls_live);
  ticket.pull->Fail(status);
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

CallTicket Agent::StartCall(ByteView address, Bytes payload, bool is_idempotent) {
  return StartRequest(address, FrameType::kCall, std::move(payload), is_idempotent);
}

CallTicket Agent::StartChecksum(ByteView address, const Key &key) {
  return StartRequest(
      address, FrameType::kChecksum, Pack(ChecksumRequest{.key = key}), true);
}

CallTicket Agent::StartRequest(ByteView address,
                               FrameType kind,
                               Bytes payload,
                               bool is_idempotent) {
  CallTicket ticket;
  bool is_too_long = payload.size() > limits::kMaxCallPayload;
  Status status =
      is_too_long
          ? Status{Code::kRefused, kTooLong}
          : WithPeer(address, [&](const std::shared_ptr<Peer> &peer) {
              ticket = {std::make_shared<Call>(
                            next_call_++, kind, is_idempotent, &counters_.calls_live),
                        peer};
              loop_.Post(
                  [peer, call = ticket.call, payload = std::move(payload)]() mutable {
                    peer->Submit(call, std::move(payload));
                  });
            });
  if (status.ok()) return ticket;
  ticket.call = std::make_shared<Call>(0, kind, is_idempotent, &counters_.calls_live);
  ticket.call->Fail(status);
  return ticket;
}

void Agent::Cancel(const CallTicket &ticket) {
  if (ticket.call->is_settled()) return;
  ticket.call->Fail({Code::kCancelled, "the call was cancelled"});
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
  Status status = WithPeer(
      address, [&](const std::shared_ptr<Peer> &peer) { reasons = peer->Reasons(); });
  if (!status.ok()) reasons.fill(status.text);
  return reasons;
}

std::map<std::string, int64_t> Agent::Stats() const {
  std::map<std::string, int64_t> stats = {
      {"regions", regions_.size()},
      {"pinned", service_.pinned()},
      {"pinned_bytes", service_.pinned_bytes()},
      {"pulls_live", counters_.pulls_live},
      {"calls_live", counters_.calls_live},
      {"connections", counters_.connections},
      {"bytes_granted", counters_.bytes_granted},
      {"pool_used", pool_->used_bytes()},
      {"pool_free", pool_->free_bytes()},
      {"pooled_bytes", pool_->used_bytes() + pool_->free_bytes()},
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
    CloseAll();
    closed.set_value();
  });
  closed.get_future().wait();
  loop_.Stop();
  copies_.Stop();
  regions_.ReleaseAll();
  events_.Push({.kind = Event::Kind::kStopped});
}

void Agent::CloseAll() {
  acceptor_.reset();
  service_.Shutdown();
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto &[id, peer] : peers_) peer->Shutdown(Stopped());
}

void Agent::TickAll() {
  loop_.After(limits::kTickS, [this] { TickAll(); });
  pool_->Trim(limits::kPoolIdleS);
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto &[id, peer] : peers_) peer->Tick();
  // If the map holds the only reference, no other thread is about to use the peer.
  std::erase_if(peers_, [](const auto &entry) {
    return entry.second.use_count() == 1 && entry.second->is_idle();
  });
}

std::shared_ptr<Peer> Agent::PeerLocked(const Address &address) {
  std::shared_ptr<Peer> &peer = peers_[address.agent];
  if (!peer) {
    peer = std::make_shared<RemotePeer>(context_, address);
  }
  return peer;
}

// Under the lock, so that tasks that `use` posts run before the one that Stop posts.
Status Agent::WithPeer(ByteView bytes, const UsePeer &use) {
  Address address = Parsed(bytes);
  if (address.version != kProtocolVersion) {
    return {Code::kVersion, VersionMismatchText(kProtocolVersion, address.version)};
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_stopped_) return Stopped();
  use(PeerLocked(address));
  return {};
}

}  // namespace ray::rdt
