// What a stranger, and a peer that knows the secret and no key, get from an agent.
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <future>

#include "fixtures.h"
#include "ray/rdt/connector.h"
#include "ray/rdt/limits.h"
#include "ray/rdt/net.h"

namespace fixtures {
namespace {

constexpr size_t kObjectBytes = 3 << 20;

// One socket to an agent, used without an agent.
class Caller {
 public:
  explicit Caller(const Agent &agent, bool over_unix = true) {
    auto address = ParseAddress(agent.address());
    CHECK(address.has_value());
    agent_ = address->agent;
    fd_ = over_unix ? ConnectUnix(agent_) : ConnectTcp(address->ip, address->port);
    CHECK(static_cast<bool>(fd_));
  }

  void Send(const Bytes &bytes) {
    send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }

  // Empty when the agent closed the connection; fails if nothing comes at all.
  Bytes Receive() {
    Bytes frame = Take(sizeof(FrameHeader));
    if (frame.empty()) return frame;
    Bytes payload = Take(DecodeHeader(frame.data()).length);
    frame.insert(frame.end(), payload.begin(), payload.end());
    return frame;
  }
  bool IsClosed() { return Take(1).empty(); }

  // Finishes a handshake in the name of an agent. `more` goes with the PROOF.
  void Authenticate(Purpose purpose, uint8_t name, const Bytes &more = {}) {
    Identity self;
    self.agent.fill(name);
    self.secret = "secret";
    self.lanes = kAllLanes;
    auto client = Handshake::Client(self, purpose, agent_);
    Send(client.FirstFrame());
    while (client.state() == Handshake::State::kRunning) {
      Bytes frame = Receive();
      CHECK(!frame.empty());
      Bytes answer = client.OnFrame(DecodeHeader(frame.data()),
                                    ByteView(frame).subspan(sizeof(FrameHeader)));
      answer.insert(answer.end(), more.begin(), more.end());
      if (client.state() == Handshake::State::kRunning) Send(answer);
    }
    CHECK(client.state() == Handshake::State::kDone);
  }

 private:
  Bytes Take(size_t nbytes) {
    Bytes taken(nbytes);
    for (size_t at = 0; at < nbytes;) {
      pollfd one{.fd = fd_.get(), .events = POLLIN, .revents = 0};
      CHECK_EQ(poll(&one, 1, static_cast<int>(kLong * 1000)), 1);
      ssize_t got = recv(fd_.get(), taken.data() + at, nbytes - at, 0);
      if (got <= 0) return {};
      at += static_cast<size_t>(got);
    }
    return taken;
  }

  AgentId agent_{};
  Fd fd_;
};

struct Served {
  Served() : memory(kObjectBytes), agent(MakeAgent()) {
    memory.FillRandom(1);
    agent->regions().Register(KeyOf(1), memory.Whole(), 1);
  }
  Memory memory;
  std::unique_ptr<Agent> agent;
};

FrameType TypeOf(const Bytes &frame) {
  CHECK(frame.size() >= sizeof(FrameHeader));
  return DecodeHeader(frame.data()).type;
}

template <class M>
M MessageOf(const Bytes &frame) {
  auto message = Unpack<M>(ByteView(frame).subspan(sizeof(FrameHeader)));
  CHECK(message.has_value());
  return *message;
}

void CheckServes(const Agent &agent) {
  Caller next(agent);
  next.Authenticate(Purpose::kControl, 7);
  next.Send(EncodeFrame(FrameType::kPing, 1));
  CHECK(TypeOf(next.Receive()) == FrameType::kPong);
}

TEST("acceptor: without a proof every request is answered by an error and the end") {
  Served served;
  for (FrameType type : {FrameType::kPull,
                         FrameType::kCall,
                         FrameType::kFree,
                         FrameType::kOwn,
                         FrameType::kChecksum,
                         FrameType::kRead,
                         FrameType::kPing}) {
    Caller caller(*served.agent);
    caller.Send(EncodeFrame(type, 1, PullRequest{.key = KeyOf(1)}));
    CHECK(TypeOf(caller.Receive()) == FrameType::kError);
    CHECK(caller.IsClosed());
  }
  CHECK_EQ(served.agent->Stats().at("regions"), 1);
  for (const Event &event : served.agent->NextEvents(0)) {
    CHECK(event.kind == Event::Kind::kLog);
  }
}

TEST("acceptor: a frame over 512 bytes is refused by its header alone") {
  Served served;
  Caller caller(*served.agent);
  FrameHeader header{.type = FrameType::kHello,
                     .length = limits::kMaxFrameBeforeAuth + 1};
  Bytes bytes(sizeof(header));
  std::memcpy(bytes.data(), &header, sizeof(header));
  caller.Send(bytes);
  CHECK(caller.IsClosed());
}

TEST("acceptor: the oldest of too many unauthenticated connections is closed") {
  Served served;
  Caller oldest(*served.agent);
  std::vector<std::unique_ptr<Caller>> others;
  for (size_t i = 0; i < limits::kMaxUnauthenticated; ++i) {
    others.push_back(std::make_unique<Caller>(*served.agent));
  }
  CHECK(oldest.IsClosed());
  CheckServes(*served.agent);
}

TEST("acceptor: many TCP connections do not block a Unix connection") {
  Served served;
  Caller slow(*served.agent);
  std::vector<std::unique_ptr<Caller>> crowd;
  for (size_t i = 0; i < limits::kMaxUnauthenticated + 2; ++i) {
    crowd.push_back(std::make_unique<Caller>(*served.agent, false));
  }
  CHECK(crowd[1]->IsClosed());
  slow.Authenticate(Purpose::kControl, 7);
}

// Returns the result of a connector whose first `drops` connections are closed unread.
Status ConnectDropped(int drops) {
  Bench bench;
  auto &loop = bench.loop;
  Acceptor acceptor(bench.context,
                    [](const std::shared_ptr<Channel> &, const PeerInfo &) {});
  Fd listener = ListenUnix(bench.self.agent);
  Loop::Id watch = loop.Watch(listener.get(), EPOLLIN, [&](uint32_t) {
    if (--drops >= 0) return AcceptOne(listener.get()).Reset();
    loop.Unwatch(watch);
    acceptor.ListenOn(std::move(listener), true);
  });
  std::promise<Status> result;
  Connector connector(
      bench.context,
      bench.address,
      Purpose::kControl,
      [&](const Status &status, std::shared_ptr<Channel> channel, const PeerInfo &) {
        if (channel) channel->Close();
        result.set_value(status);
      });
  loop.Start();
  Status status = result.get_future().get();
  loop.Stop();
  return status;
}

TEST(
    "acceptor: a client dropped before its proof connects again, a limited number of "
    "times") {
  CHECK_EQ(ConnectDropped(6).text, "");
  auto began = Clock::now();
  Status status = ConnectDropped(1000);
  CHECK(Clock::now() - began > std::chrono::seconds(1));  // a crowd may be gone by then
  CHECK(status.code == Code::kUnreachable);
  CHECK(status.text.find("the handshake did not finish") != std::string::npos);
}

TEST("acceptor: a silent client is closed after the handshake timeout") {
  Served served;
  auto began = std::chrono::steady_clock::now();
  Caller silent(*served.agent);
  Bytes hello = EncodeFrame(FrameType::kHello, 0, Hello{});
  hello.resize(hello.size() / 2);
  silent.Send(hello);
  CHECK(silent.IsClosed());
  std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  CHECK(took.count() > limits::kHandshakeTimeoutS / 2);
}

TEST("acceptor: another user of the host is refused") {
  if (geteuid() != 0) return;  // only root can become another user
  Served served;
  AgentId agent = ParseAddress(served.agent->address())->agent;
  pid_t child = fork();
  if (child == 0) {
    Fd fd = setuid(65534) == 0 ? ConnectUnix(agent) : Fd();
    char byte;
    pollfd one{.fd = fd.get(), .events = POLLIN, .revents = 0};
    bool is_closed = fd && poll(&one, 1, 20000) == 1 && recv(fd.get(), &byte, 1, 0) <= 0;
    _exit(is_closed ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
  auto said = AwaitEvent(served.agent.get(), Event::Kind::kLog);
  CHECK(said && said->text.find("another user") != std::string::npos);
}

TEST("acceptor: a peer reaches what it has a key for, and nothing else") {
  Served served;
  Caller peer(*served.agent);
  peer.Authenticate(Purpose::kControl, 7);
  peer.Send(EncodeFrame(FrameType::kPull, 1, PullRequest{.key = KeyOf(2)}));
  CHECK(TypeOf(peer.Receive()) == FrameType::kRefuse);
  peer.Send(EncodeFrame(FrameType::kChecksum, 2, ChecksumRequest{.key = KeyOf(2)}));
  Bytes reply = peer.Receive();
  CHECK(TypeOf(reply) == FrameType::kReply);
  CHECK_EQ(reply[sizeof(FrameHeader)], 1);
  peer.Send(EncodeFrame(FrameType::kFree, 0, KeyList{.keys = {KeyOf(2)}}));
  peer.Send(EncodeFrame(FrameType::kPull, 3, PullRequest{.key = KeyOf(1)}));
  CHECK_EQ(MessageOf<Grant>(peer.Receive()).total, kObjectBytes);
}

TEST("acceptor: a data connection reads what its agent was granted, within its bounds") {
  Served served;
  Caller control(*served.agent);
  Caller data(*served.agent);
  Caller other(*served.agent);
  control.Authenticate(Purpose::kControl, 7);
  data.Authenticate(Purpose::kData, 7);
  other.Authenticate(Purpose::kData, 8);
  control.Send(EncodeFrame(FrameType::kPull, 1, PullRequest{.key = KeyOf(1)}));
  CHECK(TypeOf(control.Receive()) == FrameType::kGrant);
  auto read = [](Caller *caller, uint64_t pull, Read range) {
    caller->Send(EncodeFrame(FrameType::kRead, pull, range));
    return caller->Receive().size() - sizeof(FrameHeader);
  };
  CHECK_EQ(read(&data, 1, {.offset = 5, .nbytes = 100}), 100u);
  CHECK_EQ(read(&data, 2, {.offset = 0, .nbytes = 100}), 0u);
  CHECK_EQ(read(&data, 1, {.offset = kObjectBytes, .nbytes = 1}), 0u);
  CHECK_EQ(read(&data, 1, {.offset = UINT64_MAX, .nbytes = 2}), 0u);
  CHECK_EQ(read(&other, 1, {.offset = 0, .nbytes = 100}), 0u);
}

TEST("acceptor: a data connection that asks before it is welcome ends, and only that") {
  Served served;
  Caller hasty(*served.agent);
  hasty.Authenticate(
      Purpose::kData, 7, EncodeFrame(FrameType::kRead, 1, Read{.nbytes = 1}));
  CHECK(hasty.IsClosed());
  CheckServes(*served.agent);
}

TEST("acceptor: without a ring, no fill is accepted, not even an empty one") {
  Served served;
  Caller peer(*served.agent);
  peer.Authenticate(Purpose::kControl, 7);
  peer.Send(EncodeFrame(FrameType::kPull, 1, PullRequest{.key = KeyOf(1)}));
  CHECK(TypeOf(peer.Receive()) == FrameType::kGrant);
  peer.Send(EncodeFrame(FrameType::kFill, 1, Fill{}));
  CHECK(peer.IsClosed());
  CheckServes(*served.agent);
}

TEST("acceptor: the pull id of another consumer cannot be guessed") {
  Served served;
  auto consumer = MakeAgent();
  Memory destination(kObjectBytes);
  std::vector<uint64_t> ids;
  for (int i = 0; i < 8; ++i) {
    PullTicket ticket =
        consumer->StartPull(served.agent->address(), KeyOf(1), destination.Whole());
    CHECK_EQ(Outcome(ticket.pull.get()).text, "");
    for (uint64_t other : ids) {
      CHECK(std::max(other, ticket.pull->id) - std::min(other, ticket.pull->id) >
            1 << 20);
    }
    ids.push_back(ticket.pull->id);
  }
}

TEST("acceptor: a peer that sends nonsense loses its connection, and only that") {
  Served served;
  Caller peer(*served.agent);
  peer.Authenticate(Purpose::kControl, 7);
  peer.Send(EncodeFrame(FrameType::kPull, 1, ByteView()));
  CHECK(peer.IsClosed());
  CheckServes(*served.agent);
}

}  // namespace
}  // namespace fixtures
