#include "ray/rdt/service.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "ray/rdt/address.h"
#include "ray/rdt/lanes/shm.h"
#include "ray/rdt/lanes/tcp_source.h"
#include "ray/rdt/limits.h"
#include "ray/rdt/read_memory.h"
#include "ray/rdt/shared_copy.h"

namespace ray::rdt {
namespace {

// Computes the checksum of a region on the copy threads, which share it.
class ChecksumJob {
 public:
  explicit ChecksumJob(Pin pin) : pin_(std::move(pin)) {}

  // Processes one chunk. True if there may be more.
  bool Step() {
    uint64_t total = pin_->memory.total();
    uint64_t offset = next_.fetch_add(limits::kMaxChunk);
    if (offset >= total) return false;
    uint64_t nbytes = std::min(limits::kMaxChunk, total - offset);
    sum_ += ChecksumOf({offset, nbytes});
    if (done_.fetch_add(nbytes) + nbytes == total) pin_->checksum.Set(sum_);
    return true;
  }

 private:
  static_assert(limits::kMaxChunk % kChecksumBlock == 0);

  // Blocks that cannot be read are left out: a pull of them fails with the reason.
  uint64_t ChecksumOf(Range range) const {
    uint64_t sum = 0;
    std::vector<char> bytes(std::min(kChecksumBlock, range.nbytes));
    while (range.nbytes > 0) {
      Range block{range.offset, std::min(kChecksumBlock, range.nbytes)};
      if (ReadOwnMemory(pin_->memory, block, bytes.data()).ok()) {
        sum += ChecksumOfBlock(bytes.data(), block.nbytes, block.offset / kChecksumBlock);
      }
      range = {range.offset + block.nbytes, range.nbytes - block.nbytes};
    }
    return sum;
  }

  const Pin pin_;
  std::atomic<uint64_t> next_{0};
  std::atomic<uint64_t> done_{0};
  std::atomic<uint64_t> sum_{0};
};

}  // namespace

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
    service_->pins_->RemoveAll(agent_, this);
    // The consumer may live on and have them mapped.
    for (auto &[id, copy] : copies_) copy->Abandon();
  }

  const AgentId &agent() const { return agent_; }

  void OnFrame(const FrameHeader &header, ByteView payload, Fds *attached) override {
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
  bool Handle(const FrameHeader &header, ByteView payload, Fds *attached) {
    switch (header.type) {
    case FrameType::kPull:
      return OnPull(header.request, Unpack<PullRequest>(payload));
    case FrameType::kDone:
      if (Pin pin = service_->pins_->Find(agent_, header.request)) {
        service_->context_.huge_pages->RecordPull(pin->memory, pin);
      }
      service_->pins_->Remove(agent_, header.request, this);
      copies_.erase(header.request);
      return true;
    case FrameType::kAbort:
      service_->pins_->Remove(agent_, header.request, this);
      AbandonCopy(header.request);
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
      return OnRing(Unpack<Ring>(payload), attached);
    case FrameType::kFill:
      return shm_.OnFill(header.request,
                         Unpack<Fill>(payload),
                         service_->pins_->Find(agent_, header.request));
    case FrameType::kPing:
      channel_->Send(EncodeFrame(FrameType::kPong, header.request));
      return true;
    default:
      return false;
    }
  }

  bool OnPull(uint64_t id, const std::optional<PullRequest> &request) {
    if (!request) return false;
    Pin pin;
    Status status = service_->regions_->FindIntact(request->key, &pin);
    Grant grant;
    if (status.ok()) {
      bool is_shared = request->mode == PullMode::kFile;
      if (request->mode == PullMode::kAny)
        is_shared = !pin->places.empty() || service_->fan_outs_.Expects(*pin, agent_);
      if (is_shared && pin->memory.total() > 0) {
        ShareCopy(id, std::move(pin));
        return true;
      }
      status = MakeGrant(id, *request, std::move(pin), &grant);
    }
    Answer(id, status, grant);
    return true;
  }

  void Answer(uint64_t id, const Status &status, const Grant &grant) {
    if (status.ok()) {
      service_->context_.counters->bytes_granted += grant.total;
      channel_->Send(EncodeFrame(FrameType::kGrant, id, grant));
    } else {
      Refuse refuse{.code = static_cast<uint8_t>(status.code), .text = status.text};
      channel_->Send(EncodeFrame(FrameType::kRefuse, id, refuse));
    }
  }

  // Attaches the bytes of a small object, and pins another.
  Status MakeGrant(uint64_t id, const PullRequest &request, Pin pin, Grant *grant) {
    grant->total = pin->memory.total();
    uint64_t max_attached = std::min(request.max_attached, limits::kMaxAttachedAccepted);
    if (grant->total > 0 && grant->total <= max_attached) {
      grant->attached.resize(grant->total);
      return ReadOwnMemory(pin->memory, {0, grant->total}, grant->attached.data());
    }
    if (request.mode != PullMode::kStream) {
      if (pin->memory.spans().size() > kMaxSpans) return TooManyPieces();
      grant->spans = pin->memory.spans();
    }
    service_->pins_->Add(agent_, id, this, std::move(pin));
    return {};
  }

  // Answers with a copy of the object in a file. All consumers of the host get the same.
  void ShareCopy(uint64_t id, Pin pin) {
    const Context &context = service_->context_;
    if (pin->memory.spans().size() > kMaxSpans) return Answer(id, TooManyPieces(), {});
    std::shared_ptr<SharedCopy> copy = pin->copy.lock();
    if (!copy) {
      copy = SharedCopy::Create(pin, context.files);
      if (!copy) {
        Status refused{Code::kRefused, "the producer cannot create shared memory"};
        return Answer(id, refused, {});
      }
      pin->copy = copy;
      copy->WhenReady([huge_pages = context.huge_pages, pin](const Status &) {
        huge_pages->RecordPull(pin->memory, pin);
      });
      copy->Fill(context.loop, context.copies, pin);
    }
    copies_[id] = copy;
    service_->pins_->Add(agent_, id, this, std::move(pin));
    copy->WhenReady([this, id, weak = std::weak_ptr(alive_)](const Status &status) {
      if (weak.lock()) GrantCopy(id, status);
    });
  }

  void GrantCopy(uint64_t id, Status status) {
    auto found = copies_.find(id);
    if (found == copies_.end()) return;  // aborted
    service_->pins_->Remove(agent_, id, this);
    const SharedCopy &copy = *found->second;
    Fds files;
    for (const auto &file : copy.files()) {
      files.push_back(file->Duplicate());
      if (status.ok() && !files.back())
        status = {Code::kRefused, "the producer has no file descriptor left"};
    }
    Grant grant{.spans = copy.layout(), .files = copy.file_of()};
    TotalOf(grant.spans, &grant.total);
    for (size_t i = 0; status.ok() && i < files.size(); ++i) {
      File file{.nbytes = copy.files()[i]->nbytes()};
      channel_->Send(EncodeFrame(FrameType::kFile, id, file), std::move(files[i]));
    }
    if (!status.ok()) copies_.erase(found);
    Answer(id, status, grant);
  }

  void AbandonCopy(uint64_t id) {
    auto node = copies_.extract(id);
    if (node) node.mapped()->Abandon();
  }

  bool OnRing(const std::optional<Ring> &ring, Fds *attached) {
    if (attached->empty()) return false;
    Fd fd = std::move(attached->front());
    attached->pop_front();
    return shm_.OnRing(ring, std::move(fd));
  }

  bool OnOwn(const std::optional<KeyList> &own) {
    if (own) service_->regions_->SetOwner(own->keys, agent_);
    return own.has_value();
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

  // Ignored once the connection has ended.
  Replier ReplierFor(uint64_t id) const {
    return [channel = channel_, id](bool is_error, Bytes answer) {
      answer.insert(answer.begin(), is_error ? 1 : 0);
      channel->Send(EncodeFrame(FrameType::kReply, id, ByteView(answer)));
    };
  }

  static Status TooManyPieces() {
    return {Code::kRefused, "the object has too many pieces for this lane"};
  }

  // A GRANT with the spans must fit into a frame.
  static constexpr size_t kMaxSpans = limits::kMaxFrame / sizeof(Span) - 1;

  Service *const service_;
  const std::shared_ptr<Channel> channel_;
  const AgentId agent_;
  ShmSource shm_;
  // Copies that the consumer maps, or waits for, by pull.
  std::map<uint64_t, std::shared_ptr<SharedCopy>> copies_;
  // Tells a copy's callback whether this object still exists.
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

Service::Service(const Context &context, RegionTable *regions)
    : context_(context), regions_(regions) {}

Service::~Service() = default;

void Service::AddConnection(std::shared_ptr<Channel> channel, const PeerInfo &peer) {
  if (peer.purpose == Purpose::kData) {
    Fd fd = channel->Release();
    if (!fd) return;
    Loop *loop = context_.copies->loop(next_source_++);
    auto source = std::make_shared<TcpSource>(loop, std::move(fd), peer.agent, pins_);
    return loop->Post([source] { source->Start(); });
  }
  auto session = std::make_unique<Session>(this, std::move(channel), peer.agent);
  sessions_[session.get()] = std::move(session);
  ++context_.counters->connections;
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
  Pin pin;
  Status status = regions_->FindIntact(key, &pin);
  if (!status.ok()) return reply(true, Bytes(status.text.begin(), status.text.end()));
  bool is_first = pin->checksum.Request(
      [loop = context_.loop, reply = std::move(reply)](uint64_t sum) {
        loop->Post([reply, sum] { reply(false, Pack(ChecksumReply{.sum = sum})); });
      });
  if (!is_first) return;
  if (pin->memory.total() == 0) return pin->checksum.Set(0);
  auto job = std::make_shared<ChecksumJob>(std::move(pin));
  context_.copies->Add([job] { return job->Step(); }, context_.copies->threads());
}

void Service::Reply(uint64_t call, bool is_error, Bytes payload) {
  if (auto node = repliers_.extract(call)) node.mapped()(is_error, std::move(payload));
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
