#include "ray/rdt/remote_peer.h"

#include <sys/epoll.h>

#include <algorithm>

#include "ray/rdt/lanes/cma.h"
#include "ray/rdt/lanes/shm.h"
#include "ray/rdt/lanes/tcp.h"
#include "ray/rdt/net.h"

namespace ray::rdt {
namespace {

// An object up to this size is sent along with the grant: on every lane that is
// faster than to start it.
constexpr uint64_t kMaxAttached = 64 << 10;

// A peer that cannot be reached may have been cut off: what it was to be told is
// kept for so long, and tried that often.
constexpr std::chrono::seconds kNoticesKept{600};
constexpr std::chrono::seconds kNoticesEvery{5};
// Of a burst of notices only the first is sent at once, and the rest together: each
// frame wakes threads at both sides.
constexpr std::chrono::milliseconds kNoticesApart{5};

}  // namespace

RemotePeer::RemotePeer(const Context &context, const Address &address)
    : context_(context), address_(address) {}

RemotePeer::~RemotePeer() { Disconnect(); }

void RemotePeer::Submit(std::shared_ptr<Pull> pull) {
  StartSilenceClock();
  uint64_t id = pull->id;
  PendingPull &asked = pulls_[id] = {.pull = std::move(pull)};
  if (channel_) return SendPull(id, &asked);
  Connect();
}

void RemotePeer::Submit(std::shared_ptr<Call> call, Bytes payload) {
  StartSilenceClock();
  uint64_t id = call->id;
  PendingCall &called =
      calls_[id] = {.call = std::move(call), .payload = std::move(payload)};
  if (channel_) return SendCall(id, &called);
  Connect();
}

void RemotePeer::ForgetPull(uint64_t id) {
  auto node = pulls_.extract(id);
  if (node && node.mapped().is_sent && channel_) {
    channel_->Send(EncodeFrame(FrameType::kAbort, id));
  }
}

void RemotePeer::ForgetCall(uint64_t id) { calls_.erase(id); }

void RemotePeer::SendNotices() {
  if (!channel_) return Connect();
  Clock::duration early = notices_sent_at_ + kNoticesApart - Clock::now();
  if (early > Clock::duration::zero()) {
    context_.loop->After(std::chrono::duration<double>(early).count(),
                         [weak = std::weak_ptr(alive_)] {
                           if (auto peer = weak.lock()) (*peer)->SendNotices();
                         });
    return;
  }
  FlushNotices();
}

void RemotePeer::FlushNotices() {
  notices_sent_at_ = Clock::now();
  Notices notices = TakeNotices();
  // Owned first: what is freed at once must not stay owned.
  SendKeys(FrameType::kOwn, notices.owned);
  SendKeys(FrameType::kFree, notices.freed);
  FollowNotices(std::move(notices));
}

void RemotePeer::SendKeys(FrameType type, std::vector<Key> keys) {
  if (keys.empty()) return;
  channel_->Send(EncodeFrame(type, 0, KeyList{.keys = std::move(keys)}));
}

// The answer to this PING tells that the peer has seen what was sent before it.
void RemotePeer::FollowNotices(Notices notices) {
  if (notices.empty()) return;
  StartSilenceClock();
  unanswered_[++last_ping_] = std::move(notices);
  channel_->Send(EncodeFrame(FrameType::kPing, last_ping_));
}

void RemotePeer::DropNotices() {
  TakeNotices();
  unanswered_.clear();
  cut_since_.reset();
}

void RemotePeer::Tick() {
  if (!channel_) {
    if (HasNotices() && Clock::now() >= try_at_) Connect();
    return;
  }
  if (!is_waiting()) return;
  double silent_s = std::chrono::duration<double>(Clock::now() - last_heard_).count();
  if (silent_s > context_.settings->peer_timeout_s) {
    // One more try: what is silent may well be silent again.
    for (auto &[id, asked] : pulls_) asked.tries = std::max(asked.tries, kMaxTries - 1);
    for (auto &[id, called] : calls_)
      called.tries = std::max(called.tries, kMaxTries - 1);
    return Lose({Code::kPeerLost,
                 "the peer has not answered for " +
                     std::to_string(static_cast<int>(silent_s)) + " s"});
  }
  if (silent_s > context_.settings->peer_timeout_s / 3) {
    channel_->Send(EncodeFrame(FrameType::kPing, 0));
  }
}

bool RemotePeer::is_idle() const {
  return !channel_ && !connector_ && !is_waiting() && !HasNotices();
}

bool RemotePeer::is_waiting() const {
  return !pulls_.empty() || !calls_.empty() || !unanswered_.empty();
}

void RemotePeer::Shutdown(const Status &why) {
  if (channel_) FlushNotices();
  Disconnect();
  connector_.reset();
  FailAll(why);
}

// ---- connection ----

void RemotePeer::Connect() {
  if (connector_) return;
  if (!OverUnix() && !NoTcpReason().empty()) {
    return GiveUp(Named({Code::kRefused, NoTcpReason()}));
  }
  ConnectOptions options{.purpose = Purpose::kControl,
                         .over_unix = OverUnix(),
                         .connect_timeout_s = context_.settings->connect_timeout_s,
                         .peer_timeout_s = context_.settings->peer_timeout_s};
  connector_ = std::make_unique<Connector>(
      context_.loop,
      *context_.identity,
      address_,
      options,
      [this](const Status &status,
             std::shared_ptr<Channel> channel,
             const PeerInfo &info) { OnConnected(status, std::move(channel), info); });
}

void RemotePeer::OnConnected(const Status &status,
                             std::shared_ptr<Channel> channel,
                             const PeerInfo &info) {
  connector_.reset();
  if (!status.ok()) return GiveUp(Named(status));
  channel_ = std::move(channel);
  channel_->set_handler(this);
  info_ = info;
  ++context_.counters->connections;
  cut_since_.reset();
  last_heard_ = Clock::now();
  if (OverUnix()) IdentifyProcess();
  SettleLanes();
  FailBroken();
  SendAll();
}

// The kernel's word on who holds the other end. The pidfd is opened before the
// probe is read, so that the process it stands for is the one that was probed.
void RemotePeer::IdentifyProcess() {
  pid_ = PeerCredentials(channel_->fd()).pid;
  if (pid_ <= 0) return;
  pidfd_ = OpenPidFd(pid_);
  if (!pidfd_) return;
  pidfd_watch_ = context_.loop->Watch(pidfd_.get(), EPOLLIN, [this](uint32_t) {
    Lose({Code::kPeerLost, "the peer's process ended"});
  });
}

void RemotePeer::SettleLanes() {
  LaneReasons reasons =
      EvaluateLanes({.mine = context_.settings->lanes,
                     .theirs = info_.lanes,
                     .is_unix = OverUnix(),
                     .cma_probe_error = OverUnix() ? ProbeCma(pid_, info_) : "",
                     .has_tcp = NoTcpReason().empty(),
                     .no_tcp_reason = NoTcpReason()});
  for (LaneKind kind : UsableLanes(reasons)) {
    lanes_[static_cast<size_t>(kind)] = MakeLane(kind);
  }
  SetReasons(reasons);
  LogLanes(reasons);
}

void RemotePeer::LogLanes(const LaneReasons &reasons) {
  if (std::exchange(were_lanes_logged_, true)) return;
  LaneKind best = LaneKind::kTcp;
  std::string text = "RDT with " + address_.Describe() + ": ";
  text +=
      BestLane(0, &best) != nullptr ? std::string("lane ") + LaneName(best) : "no lane";
  for (size_t i = 0; i < kLaneCount && reasons[i] != "ok"; ++i) {
    text += std::string(i == 0 ? " (" : "; ") + kLaneNames[i] + ": " + reasons[i];
  }
  context_.log->Info("lanes", text + (reasons[0] != "ok" ? ")" : ""));
}

std::unique_ptr<Lane> RemotePeer::MakeLane(LaneKind kind) {
  switch (kind) {
  case LaneKind::kCma:
    return std::make_unique<CmaLane>(context_.copies, pid_);
  case LaneKind::kShm:
    return std::make_unique<ShmLane>(context_.loop, context_.copies, channel_);
  case LaneKind::kTcp:
    return std::make_unique<TcpLane>(
        context_.loop,
        context_.copies,
        *context_.identity,
        address_,
        TcpOptions{.max_streams = context_.settings->tcp_streams,
                   .connect_timeout_s = context_.settings->connect_timeout_s,
                   .peer_timeout_s = context_.settings->peer_timeout_s});
  case LaneKind::kInproc:
    break;
  }
  return nullptr;  // no other process is in this one
}

// After a cma read: the connection and the process that it was made with are
// still there, and so is the probe (the process did not exec in between). So the
// bytes came from the pinned region and nowhere else.
bool RemotePeer::IsMemoryValid() const {
  bool has_ended = pidfd_ && IsReadable(pidfd_.get());
  return !has_ended && ProbeCma(pid_, info_).empty() && !IsHungUp(channel_->fd());
}

void RemotePeer::OnClosed(const Status &why) { Lose(why); }

void RemotePeer::Lose(const Status &why) {
  bool has_ended = pidfd_ && IsReadable(pidfd_.get());
  Disconnect();
  context_.events->Push({.kind = Event::Kind::kLost, .agent = address_.agent});
  if (has_ended) DropNotices();
  for (auto &[ping, notices] : std::exchange(unanswered_, {}))
    PutBackNotices(std::move(notices));
  std::map<uint64_t, PendingPull> again;
  for (auto &[id, asked] : pulls_) {
    if (!has_ended && TryAgain(&asked)) again[id] = std::move(asked);
  }
  std::map<uint64_t, PendingCall> called_again;
  for (auto &[id, called] : calls_) {
    if (!has_ended && TryAgain(&called)) called_again[id] = std::move(called);
  }
  for (auto &[id, asked] : again) pulls_.erase(id);
  for (auto &[id, called] : called_again) calls_.erase(id);
  FailAll(Named({Code::kPeerLost, why.text}));
  pulls_ = std::move(again);
  calls_ = std::move(called_again);
  if (!pulls_.empty() || !calls_.empty()) Connect();  // notices wait for the next Tick
}

bool RemotePeer::TryAgain(PendingCall *called) {
  if (called->call->is_idempotent) called->is_sent = false;
  return ++called->tries <= kMaxTries;
}

// The peer lives, so these may have been served or not.
void RemotePeer::FailBroken() {
  for (auto it = calls_.begin(); it != calls_.end();) {
    auto here = it++;
    if (!here->second.is_sent) continue;
    here->second.call->Fail(
        Named({Code::kBroken, "the connection broke before the answer came"}));
    calls_.erase(here);
  }
}

bool RemotePeer::TryAgain(PendingPull *asked) {
  asked->pull->Resume();
  uint64_t received_bytes = asked->pull->received_bytes();
  int tries = received_bytes == asked->received_before ? asked->tries + 1 : 2;
  if (tries > kMaxTries) return false;
  *asked = {.pull = asked->pull, .tries = tries, .received_before = received_bytes};
  return true;
}

void RemotePeer::Disconnect() {
  for (auto &lane : lanes_) lane.reset();
  if (pidfd_) context_.loop->Unwatch(pidfd_watch_);
  pidfd_.Reset();
  if (!channel_) return;
  channel_->Close();
  channel_.reset();
  --context_.counters->connections;
}

// No connection. Notices wait for a later one.
void RemotePeer::GiveUp(const Status &why) {
  FailAll(why);
  Clock::time_point now = Clock::now();
  if (!cut_since_) cut_since_ = now;
  bool may_come_back = why.code == Code::kUnreachable || why.code == Code::kIo;
  if (!may_come_back || now - *cut_since_ > kNoticesKept) DropNotices();
  try_at_ = now + kNoticesEvery;
}

void RemotePeer::FailAll(const Status &why) {
  for (auto &[id, asked] : std::exchange(pulls_, {})) {
    bool is_loss = asked.tries > 1 && why.code == Code::kUnreachable;
    asked.pull->Fail(is_loss ? Status{Code::kPeerLost, why.text} : why);
  }
  for (auto &[id, called] : std::exchange(calls_, {})) {
    bool is_loss = called.tries > 1 && why.code == Code::kUnreachable;
    called.call->Fail(is_loss ? Status{Code::kPeerLost, why.text} : why);
  }
}

bool RemotePeer::OverUnix() const { return context_.self->SharesHostWith(address_); }

std::string RemotePeer::NoTcpReason() const {
  if (!context_.settings->clear_tcp) {
    return "TLS is required (RAY_USE_TLS), and RDT's connections over TCP are clear "
           "text: set RAY_RDT_ALLOW_CLEAR_TCP=1 on all nodes if the network is trusted, "
           "or "
           "return the object without a tensor transport, so that Ray sends it over TLS";
  }
  return address_.port == 0 ? "the peer does not listen on TCP" : "";
}

Status RemotePeer::Named(const Status &why) const {
  return {why.code, why.text + " (" + address_.Describe() + ")"};
}

// ---- requests ----

void RemotePeer::SendAll() {
  // Ownership before calls that speak of it, frees after the pulls that came first.
  Notices notices = TakeNotices();
  SendKeys(FrameType::kOwn, notices.owned);
  for (auto &[id, called] : calls_) SendCall(id, &called);
  // Sending may end a pull and so change the map.
  std::vector<uint64_t> ids;
  for (auto &[id, asked] : pulls_) ids.push_back(id);
  for (uint64_t id : ids) {
    if (auto found = pulls_.find(id); found != pulls_.end()) SendPull(id, &found->second);
  }
  SendKeys(FrameType::kFree, notices.freed);
  FollowNotices(std::move(notices));
}

void RemotePeer::SendPull(uint64_t id, PendingPull *asked) {
  Lane *lane = BestLane(asked->tried, &asked->lane);
  if (lane == nullptr) {
    return FinishPull(id, Named({Code::kRefused, "no lane is left to the peer"}));
  }
  asked->is_sent = true;
  asked->pull->set_lane(asked->lane);
  PullRequest request{.key = asked->pull->key,
                      .with_spans = lane->reads_memory(),
                      .max_attached = kMaxAttached};
  channel_->Send(EncodeFrame(FrameType::kPull, id, request));
}

void RemotePeer::SendCall(uint64_t id, PendingCall *called) {
  if (std::exchange(called->is_sent, true)) return;
  // A request may end what the notices before it keep.
  if (HasNotices()) FlushNotices();
  channel_->Send(EncodeFrame(called->call->kind, id, ByteView(called->payload)));
  if (!called->call->is_idempotent) called->payload = {};
}

Lane *RemotePeer::BestLane(LaneSet but_not, LaneKind *kind) {
  for (size_t i = 0; i < kLaneCount; ++i) {
    *kind = static_cast<LaneKind>(i);
    if (lanes_[i] && !HasLane(but_not, *kind)) return lanes_[i].get();
  }
  return nullptr;
}

void RemotePeer::DisableLane(LaneKind lane, const std::string &why) {
  LaneReasons reasons = Reasons();
  reasons[static_cast<size_t>(lane)] = why;
  SetReasons(reasons);
  lanes_[static_cast<size_t>(lane)].reset();
  context_.log->Warning("lanes",
                        std::string("RDT gives up lane ") + LaneName(lane) + " with " +
                            address_.Describe() + ": " + why);
}

void RemotePeer::OnFrame(const FrameHeader &header, ByteView payload, Fd * /*attached*/) {
  last_heard_ = Clock::now();
  if (header.version != kProtocolVersion || !Handle(header, payload)) {
    Lose({Code::kPeerLost, "the peer sent a malformed or unknown frame"});
  }
}

// False when the frame is none that a producer sends.
bool RemotePeer::Handle(const FrameHeader &header, ByteView payload) {
  switch (header.type) {
  case FrameType::kGrant:
    return OnGrant(header.request, Unpack<Grant>(payload));
  case FrameType::kRefuse:
    return OnRefuse(header.request, Unpack<Refuse>(payload));
  case FrameType::kReply:
    return OnReply(header.request, payload);
  case FrameType::kFilled:
    if (Lane *shm = lanes_[static_cast<size_t>(LaneKind::kShm)].get()) {
      shm->OnFrame(header, payload);
    }
    return true;
  case FrameType::kPong:
    unanswered_.erase(unanswered_.begin(), unanswered_.upper_bound(header.request));
    return true;
  default:
    return false;
  }
}

bool RemotePeer::OnGrant(uint64_t id, std::optional<Grant> grant) {
  uint64_t span_bytes = 0;
  if (!grant || !TotalOf(grant->spans, &span_bytes)) return false;
  auto found = pulls_.find(id);
  if (found == pulls_.end()) return true;  // forgotten; an ABORT is on its way
  PendingPull &asked = found->second;
  asked.is_granted = true;
  if (Status fit = asked.pull->CheckTotal(grant->total); !fit.ok()) {
    FinishPull(id, fit);
    return true;
  }
  if (grant->total == 0 || !grant->attached.empty()) return TakeAttached(id, *grant);
  Lane *lane = lanes_[static_cast<size_t>(asked.lane)].get();
  if (lane == nullptr) {  // given up since the pull was sent
    TryNextLane(id);
    return true;
  }
  if (lane->reads_memory() && span_bytes != grant->total) return false;
  if (asked.pull->is_whole()) {  // all had landed when the last connection broke
    FinishPull(id, {});
  } else {
    StartLane(id, *grant);
  }
  return true;
}

void RemotePeer::StartLane(uint64_t id, const Grant &grant) {
  const PendingPull &asked = pulls_.at(id);
  uint64_t attempt = asked.pull->attempt();
  auto report = [loop = context_.loop, weak = std::weak_ptr(alive_), id, attempt](
                    const Status &status) {
    loop->Post([weak, id, attempt, status] {
      if (auto peer = weak.lock()) (*peer)->OnMoved(id, attempt, status);
    });
  };
  lanes_[static_cast<size_t>(asked.lane)]->Start(asked.pull, grant, std::move(report));
}

bool RemotePeer::TakeAttached(uint64_t id, const Grant &grant) {
  if (grant.attached.size() != grant.total) return false;
  Pull &pull = *pulls_.at(id).pull;
  Range range;
  uint64_t attempt = pull.attempt(), sum = 0;
  while (pull.TakeRange(attempt, grant.total, &range) && pull.BeginWrite(attempt)) {
    auto copy = [&](Range part) {
      pull.destination.CopyIn(part, grant.attached.data() + part.offset);
      return Status{};
    };
    pull.Fill(range, copy, &sum);
    pull.EndWrite();
    pull.CompleteRange(attempt, range, std::exchange(sum, 0));
  }
  FinishPull(id, {});
  return true;
}

bool RemotePeer::OnRefuse(uint64_t id, const std::optional<Refuse> &refuse) {
  if (!refuse) return false;
  auto found = pulls_.find(id);
  if (found == pulls_.end()) return true;
  Code code = CodeFromWire(refuse->code);
  if (code == Code::kRefused) {  // this lane cannot carry it
    TryNextLane(id);
  } else {
    FinishPull(id, Named({code, refuse->text}));
  }
  return true;
}

bool RemotePeer::OnReply(uint64_t id, ByteView payload) {
  if (payload.empty()) return false;
  auto node = calls_.extract(id);
  if (!node) return true;
  node.mapped().call->Answer(payload[0] != 0, Bytes(payload.begin() + 1, payload.end()));
  return true;
}

void RemotePeer::OnMoved(uint64_t id, uint64_t attempt, const Status &status) {
  auto found = pulls_.find(id);
  if (found == pulls_.end() || found->second.pull->attempt() != attempt) return;
  bool read_memory = found->second.lane == LaneKind::kCma;
  if (read_memory && status.ok() && !IsMemoryValid()) {
    return Lose({Code::kPeerLost, "the peer ended during the pull"});
  }
  // A data connection may tell of the end before the control connection does.
  if (status.code == Code::kIo && found->second.tries < kMaxTries) return AskAgain(id);
  if (status.code != Code::kRefused) return FinishPull(id, status);
  LaneKind lane = found->second.lane;
  if (lanes_[static_cast<size_t>(lane)]) DisableLane(lane, status.text);
  TryNextLane(id);
}

void RemotePeer::TryNextLane(uint64_t id) {
  PendingPull &asked = pulls_.at(id);
  channel_->Send(EncodeFrame(FrameType::kAbort, id));
  asked.pull->Restart();
  asked.tried |= LaneBit(asked.lane);
  asked.is_granted = false;
  SendPull(id, &asked);
}

void RemotePeer::AskAgain(uint64_t id) {
  PendingPull &asked = pulls_.at(id);
  channel_->Send(EncodeFrame(FrameType::kAbort, id));
  TryAgain(&asked);
  SendPull(id, &asked);
}

void RemotePeer::FinishPull(uint64_t id, const Status &status) {
  auto node = pulls_.extract(id);
  PendingPull &asked = node.mapped();
  if (status.ok()) {
    context_.counters->CountPull(asked.lane, asked.pull->destination.total());
    asked.pull->Complete();
    context_.huge_pages->RecordPull(asked.pull->destination, nullptr);
  } else {
    asked.pull->Fail(status);
  }
  if (asked.is_sent) channel_->Send(EncodeFrame(FrameType::kDone, id));
}

void RemotePeer::StartSilenceClock() {
  if (!is_waiting()) last_heard_ = Clock::now();
}

}  // namespace ray::rdt
