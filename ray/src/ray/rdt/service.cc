#include "ray/rdt/service.h"

#include <algorithm>
#include <set>
#include <utility>

#include "ray/rdt/address.h"
#include "ray/rdt/checksum_job.h"
#include "ray/rdt/lanes/shm.h"
#include "ray/rdt/lanes/tcp_source.h"
#include "ray/rdt/limits.h"
#include "ray/rdt/read_memory.h"

namespace ray::rdt {

// The control connection of one consumer.
class Service::Session : public Channel::Handler {
 public:
  Session(Service *service, std::shared_ptr<Channel> channel, const AgentId &agent)
      : service_(service),
        channel_(std::move(channel)),
        agent_(agent),
        shm_(service->context_.loop, service->context_.copies, channel_) {
    channel_->set_handler(this);
  }

  ~Session() override {
    channel_->Close();
    for (auto &[id, granted] : pulls_) service_->pins_->Remove(agent_, id, this);
    for (uint64_t call : calls_) service_->repliers_.erase(call);
  }

  const AgentId &agent() const { return agent_; }

  void OnFrame(const FrameHeader &header, ByteView payload, Fd *attached) override {
    if (header.version != kProtocolVersion || !Handle(header, payload, attached)) {
      OnClosed({Code::kRefused, "a malformed or unknown frame"});
    }
  }

  void OnClosed(const Status &why) override {
    if (why.code != Code::kPeerLost) {
      service_->context_.log->Warning("session",
                                      "RDT dropped the connection of agent " +
                                          Hex(ByteView(agent_).first(4)) + ": " +
                                          why.text);
    }
    service_->RemoveSession(this);
  }

 private:
  // False if the frame is malformed or not one that a consumer sends.
  bool Handle(const FrameHeader &header, ByteView payload, Fd *attached) {
    switch (header.type) {
    case FrameType::kPull:
      return OnPull(header.request, Unpack<PullRequest>(payload));
    case FrameType::kDone:
      RecordPull(header.request);
      Unpin(header.request);
      return true;
    case FrameType::kAbort:
      Unpin(header.request);
      return true;
    case FrameType::kFree:
      return OnFree(Unpack<KeyList>(payload));
    case FrameType::kOwn:
      return OnOwn(Unpack<KeyList>(payload));
    case FrameType::kCall:
      service_->ForwardCall(agent_, payload, ReplierFor(header.request));
      return true;
    case FrameType::kChecksum:
      return OnChecksum(header.request, Unpack<ChecksumRequest>(payload));
    case FrameType::kRing:
      return OnRing(Unpack<Ring>(payload), Fd(std::move(*attached)));
    case FrameType::kFill:
      return OnFill(header.request, Unpack<Fill>(payload));
    case FrameType::kPing:
      channel_->Send(EncodeFrame(FrameType::kPong, header.request));
      return true;
    default:
      return false;
    }
  }

  bool OnPull(uint64_t id, const std::optional<PullRequest> &request) {
    if (!request) return false;
    Pin pin = service_->regions_->Find(request->key);
    if (!pin) {
      RefusePull(id, Code::kNotFound, "the producer has no such object (it was freed)");
      return true;
    }
    if (Status status = pin->Check(); !status.ok()) {
      RefusePull(id, status.code, status.text);
      return true;
    }
    Grant grant{.total = pin->memory.total()};
    if (grant.total > 0 &&
        grant.total <= std::min(request->max_attached, limits::kMaxAttachedAccepted)) {
      grant.attached.resize(grant.total);
      Status status = ReadOwnMemory(pin->memory, {0, grant.total}, grant.attached.data());
      if (!status.ok()) {
        RefusePull(id, status.code, status.text);
        return true;
      }
    } else if (request->with_spans && pin->memory.spans().size() > kMaxSpans) {
      RefusePull(id, Code::kRefused, "the object has too many pieces for this lane");
      return true;
    } else {
      if (request->with_spans) grant.spans = pin->memory.spans();
      service_->pins_->Add(agent_, id, this, pin);
      pulls_[id] = std::move(pin);
    }
    service_->context_.counters->bytes_granted += grant.total;
    channel_->Send(EncodeFrame(FrameType::kGrant, id, grant));
    return true;
  }

  bool OnRing(const std::optional<Ring> &ring, Fd fd) {
    return ring && shm_.OnRing(*ring, std::move(fd));
  }

  bool OnFill(uint64_t id, const std::optional<Fill> &fill) {
    auto found = pulls_.find(id);
    return fill &&
           shm_.OnFill(id, *fill, found == pulls_.end() ? nullptr : found->second);
  }

  void RefusePull(uint64_t id, Code code, const std::string &text) {
    Refuse refuse{.code = static_cast<uint8_t>(code), .text = text};
    channel_->Send(EncodeFrame(FrameType::kRefuse, id, refuse));
  }

  void RecordPull(uint64_t id) {
    auto found = pulls_.find(id);
    if (found == pulls_.end()) return;
    service_->context_.huge_pages->RecordPull(found->second->memory, found->second);
  }

  void Unpin(uint64_t id) {
    if (pulls_.erase(id) > 0) service_->pins_->Remove(agent_, id, this);
  }

  bool OnOwn(const std::optional<KeyList> &own) {
    if (!own) return false;
    service_->regions_->SetOwner(own->keys, agent_);
    return true;
  }

  bool OnFree(const std::optional<KeyList> &free) {
    if (!free) return false;
    for (const Key &key : free->keys) service_->regions_->Release(key);
    return true;
  }

  bool OnChecksum(uint64_t id, const std::optional<ChecksumRequest> &request) {
    if (request) service_->FindChecksum(request->key, ReplierFor(id));
    return request.has_value();
  }

  // The callback for the service's next call. The destructor removes it, so `this` is
  // valid when it runs.
  Replier ReplierFor(uint64_t id) {
    uint64_t call = service_->next_call_;
    calls_.insert(call);
    return [this, id, call](bool is_error, Bytes answer) {
      calls_.erase(call);
      answer.insert(answer.begin(), is_error ? 1 : 0);
      channel_->Send(EncodeFrame(FrameType::kReply, id, ByteView(answer)));
    };
  }

  // A GRANT with the spans must fit into a frame.
  static constexpr size_t kMaxSpans = limits::kMaxFrame / sizeof(Span) - 1;

  Service *const service_;
  const std::shared_ptr<Channel> channel_;
  const AgentId agent_;
  ShmSource shm_;
  std::map<uint64_t, Pin> pulls_;
  std::set<uint64_t> calls_;  // keys of this session in repliers_
};

Service::Service(const Context &context, RegionTable *regions)
    : context_(context), regions_(regions) {}

Service::~Service() = default;

void Service::AddConnection(std::shared_ptr<Channel> channel, const PeerInfo &peer) {
  if (peer.purpose == Purpose::kData)
    return StartTcpSource(channel->Release(), peer.agent);
  auto session = std::make_unique<Session>(this, std::move(channel), peer.agent);
  sessions_[session.get()] = std::move(session);
  ++context_.counters->connections;
}

// Moves a data connection to a copy thread.
void Service::StartTcpSource(Fd fd, const AgentId &consumer) {
  if (!fd) return;
  Loop *loop = context_.copies->loop(next_source_++);
  auto source = std::make_shared<TcpSource>(loop, std::move(fd), consumer, pins_);
  loop->Post([source] { source->Start(); });
}

void Service::ForwardCall(const AgentId &from, ByteView payload, Replier reply) {
  uint64_t call = next_call_++;
  repliers_[call] = std::move(reply);
  context_.events->Push({.kind = Event::Kind::kCall,
                         .call = call,
                         .agent = from,
                         .payload = Bytes(payload.begin(), payload.end())});
}

void Service::FindChecksum(const Key &key, Replier reply) {
  uint64_t call = next_call_++;
  repliers_[call] = std::move(reply);
  Pin pin = regions_->Find(key);
  Status status{Code::kNotFound, "the producer has no such object (it was freed)"};
  if (pin) status = pin->Check();
  if (!status.ok()) {
    Reply(call, true, Bytes(status.text.begin(), status.text.end()));
    return;
  }
  bool is_first = pin->checksum.Request([this, call](uint64_t sum) {
    context_.loop->Post(
        [this, call, sum] { Reply(call, false, Pack(ChecksumReply{.sum = sum})); });
  });
  if (is_first) StartChecksum(context_.copies, std::move(pin));
}

bool Service::Reply(uint64_t call, bool is_error, Bytes payload) {
  auto node = repliers_.extract(call);
  if (!node) return false;
  node.mapped()(is_error, std::move(payload));
  return true;
}

void Service::Shutdown() {
  sessions_.clear();
  repliers_.clear();
}

void Service::RemoveSession(Session *session) {
  AgentId agent = session->agent();
  sessions_.erase(session);
  --context_.counters->connections;
  context_.events->Push({.kind = Event::Kind::kLost, .agent = agent});
}

}  // namespace ray::rdt
