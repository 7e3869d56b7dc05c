#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <future>
#include <thread>

#include "fixtures.h"
#include "ray/rdt/lanes/ring.h"
#include "ray/rdt/lanes/shm.h"
#include "ray/rdt/lanes/tcp.h"
#include "ray/rdt/net.h"

namespace fixtures {
namespace {

constexpr size_t kMiB = 1 << 20;

struct LaneCase {
  const char *name;
  LaneSet lanes;
  LaneKind lane;
};

constexpr LaneCase kRemoteLanes[] = {{"cma", 0b11111, LaneKind::kCma},
                                     {"shm", 0b11000, LaneKind::kShm},
                                     {"tcp", 0b10000, LaneKind::kTcp}};

// Pulls `source` of `producer` into memory that is cut up in another way.
void RoundTrip(
    Agent *producer, Agent *consumer, size_t nbytes, size_t cuts, LaneKind lane) {
  Memory source(nbytes);
  Memory destination(nbytes);
  source.FillRandom(3);
  CHECK(producer->regions().Register(KeyOf(9), source.Cut(cuts, 1), 1));
  PullTicket ticket = consumer->StartPull(
      producer->address(), KeyOf(9), destination.Cut(cuts / 2 + 1, 2));
  Status status = Outcome(ticket.pull.get());
  CHECK_EQ(status.text, "");
  CHECK(source == destination);
  CHECK_EQ(ticket.pull->lane(), static_cast<int>(lane));
  CHECK(producer->regions().Release(KeyOf(9)));
  CHECK(AwaitEvent(producer, Event::Kind::kReleased));
}

void EverySize(Agent *producer, Agent *consumer, LaneKind lane) {
  for (size_t nbytes : {size_t{0},
                        size_t{1},
                        size_t{64} << 10,
                        (size_t{64} << 10) + 1,
                        3 * kMiB + 17,
                        20 * kMiB + 1}) {
    for (size_t cuts : {1, 2, 13, 3000})
      RoundTrip(producer, consumer, nbytes, cuts, lane);
  }
}

TEST("lanes: inproc carries every size and segmentation") {
  auto agent = MakeAgent();
  EverySize(agent.get(), agent.get(), LaneKind::kInproc);
}

TEST("lanes: cma, shm and tcp carry every size and segmentation") {
  for (const LaneCase &one : kRemoteLanes) {
    auto producer = MakeAgent();
    auto consumer = MakeAgent(one.lanes);
    EverySize(producer.get(), consumer.get(), one.lane);
    CHECK_EQ(consumer->Stats().at(std::string("pulls_") + one.name), 24);
    CHECK(Await([&] { return producer->Stats().at("pinned") == 0; }));
  }
}

TEST("lanes: the lengths must agree") {
  for (const LaneCase &one : kRemoteLanes) {
    Memory source(100000);
    auto producer = MakeAgent();
    auto consumer = MakeAgent(one.lanes);
    Memory destination(100001);
    producer->regions().Register(KeyOf(1), source.Whole(), 1);
    PullTicket ticket =
        consumer->StartPull(producer->address(), KeyOf(1), destination.Whole());
    CHECK(Outcome(ticket.pull.get()).code == Code::kSizeMismatch);
    CHECK(Await([&] { return producer->Stats().at("pinned") == 0; }));
  }
}

TEST("lanes: between processes, each lane") {
  for (const LaneCase &one : kRemoteLanes) {
    Producer producer(9 * kMiB, kAllLanes);
    auto consumer = MakeAgent(one.lanes);
    Memory expected(9 * kMiB);
    Memory destination(9 * kMiB);
    expected.FillRandom(1);
    PullTicket ticket =
        consumer->StartPull(producer.address(), KeyOf(1), destination.Cut(5, 5));
    CHECK_EQ(Outcome(ticket.pull.get()).text, "");
    CHECK(expected == destination);
    CHECK_EQ(ticket.pull->lane(), static_cast<int>(one.lane));
  }
}

TEST("lanes: what either side forbids is not used, and said") {
  auto producer = MakeAgent(0b11000);
  auto consumer = MakeAgent(0b10101);
  RoundTrip(producer.get(), consumer.get(), 100000, 3, LaneKind::kTcp);
  LaneReasons reasons = consumer->Explain(producer->address());
  CHECK_EQ(ReasonOf(reasons, LaneKind::kCma), "forbidden by the peer's settings");
  CHECK_EQ(ReasonOf(reasons, LaneKind::kShm), "forbidden by this process's settings");
  CHECK_EQ(ReasonOf(reasons, LaneKind::kTcp), "ok");
  auto log = AwaitEvent(consumer.get(), Event::Kind::kLog);
  CHECK(log && log->text.find("lane tcp (inproc:") != std::string::npos);
}

TEST("lanes: no lane in common is a refusal, not a hang") {
  auto producer = MakeAgent(0b01000);
  auto consumer = MakeAgent(0b10000);
  Memory memory(10);
  producer->regions().Register(KeyOf(1), memory.Whole(), 1);
  PullTicket ticket = consumer->StartPull(producer->address(), KeyOf(1), memory.Whole());
  CHECK(Outcome(ticket.pull.get()).code == Code::kRefused);
}

TEST("lanes: cancel stops all writing at once") {
  for (const LaneCase &one : kRemoteLanes) {
    Memory source(4 * kMiB);
    auto producer = MakeAgent();
    auto consumer = MakeAgent(one.lanes);
    source.FillRandom(1);
    producer->regions().Register(KeyOf(1), source.Cut(100, 1), 1);
    // Allocated once: new pages for each round are slow under a sanitizer.
    Memory destination(source.size());
    Memory after(source.size());
    for (int i = 0; i < 20; ++i) {
      std::memset(destination.data(), 0, destination.size());
      PullTicket ticket =
          consumer->StartPull(producer->address(), KeyOf(1), destination.Whole());
      std::this_thread::sleep_for(std::chrono::microseconds(i * 100));
      consumer->Cancel(ticket);
      CHECK(ticket.pull->is_settled());
      std::memcpy(after.data(), destination.data(), destination.size());
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
      CHECK(after == destination);
    }
    RoundTrip(producer.get(), consumer.get(), 5 * kMiB, 3, one.lane);
    CHECK(Await([&] { return producer->Stats().at("pinned") == 0; }));
  }
}

TEST("lanes: a producer killed in a pull fails it at once") {
  for (const LaneCase &one : kRemoteLanes) {
    Producer producer(32 * kMiB, kAllLanes);
    auto consumer = MakeAgent(one.lanes);
    Memory destination(32 * kMiB);
    PullTicket first =
        consumer->StartPull(producer.address(), KeyOf(1), destination.Whole());
    CHECK(Outcome(first.pull.get()).ok());
    std::vector<std::unique_ptr<Memory>> memories;
    std::vector<PullTicket> tickets;
    for (int i = 0; i < 4; ++i) {
      memories.push_back(std::make_unique<Memory>(32 * kMiB));
      tickets.push_back(
          consumer->StartPull(producer.address(), KeyOf(1), memories.back()->Whole()));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    producer.Kill();
    for (PullTicket &ticket : tickets) {
      Status status = Outcome(ticket.pull.get(), 5);
      // What breaks first says it: the control connection, or a new one for data.
      bool is_expected = status.ok() || status.code == Code::kPeerLost ||
                         status.code == Code::kUnreachable;
      CHECK_EQ(is_expected ? "" : status.text, "");
    }
    CHECK(AwaitEvent(consumer.get(), Event::Kind::kLost));
  }
}

TEST("lanes: a producer killed before it answers fails the pull at once") {
  Producer producer(1000, kAllLanes);
  auto consumer = MakeAgent();
  Memory memory(1000);
  Outcome(consumer->StartPull(producer.address(), KeyOf(1), memory.Whole()).pull.get());
  producer.Stop();
  PullTicket ticket = consumer->StartPull(producer.address(), KeyOf(1), memory.Whole());
  CHECK(!ticket.pull->Wait(0.05));
  producer.Kill();
  CHECK(Outcome(ticket.pull.get(), 5).code == Code::kPeerLost);
}

TEST("lanes: a stopped producer does not delay other pulls") {
  for (const LaneCase &one : kRemoteLanes) {
    Producer stopped(16 * kMiB, kAllLanes);
    Producer running(16 * kMiB, kAllLanes);
    auto consumer = MakeAgent(one.lanes);
    Memory a(16 * kMiB);
    Memory b(16 * kMiB);
    Outcome(consumer->StartPull(stopped.address(), KeyOf(1), a.Whole()).pull.get());
    PullTicket held = consumer->StartPull(stopped.address(), KeyOf(1), a.Whole());
    stopped.Stop();
    for (int i = 0; i < 5; ++i) {
      PullTicket ticket = consumer->StartPull(running.address(), KeyOf(1), b.Whole());
      CHECK_EQ(Outcome(ticket.pull.get(), 5).text, "");
    }
    stopped.Continue();
    CHECK_EQ(Outcome(held.pull.get()).text, "");
  }
}

TEST("lanes: a memory file is a memfd of its size, sealed") {
  auto file = MemoryFile::Create(1 << 20);
  CHECK(file != nullptr);
  CHECK(MemoryFile::Open(file->Duplicate(), 1 << 20) != nullptr);
  CHECK(MemoryFile::Open(file->Duplicate(), 2 << 20) == nullptr);
  CHECK(MemoryFile::Open(Fd(dup(0)), 1 << 20) == nullptr);
}

TEST("lanes: shm that found no memory to share refuses from then on") {
  Loop loop("test");
  CopyPool copies(1);
  ShmLane lane(&loop, &copies, std::make_shared<Channel>(&loop, Fd()));
  std::atomic<int64_t> live{0};
  bool is_refused = false;
  auto start = [&] {
    is_refused = false;
    lane.Start(std::make_shared<Pull>(1, KeyOf(1), SpanList(), &live),
               {},
               {},
               [&](const Status &status) { is_refused = status.code == Code::kRefused; });
    return is_refused;
  };
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  rlimit none{.rlim_cur = 0, .rlim_max = limit.rlim_max};
  setrlimit(RLIMIT_NOFILE, &none);
  bool is_first_refused = start();
  setrlimit(RLIMIT_NOFILE, &limit);
  CHECK(is_first_refused);
  CHECK(start());
}

// The producer's end of a data connection, which talks before it is asked.
class Hasty : public Channel::Handler {
 public:
  Hasty(Loop *loop, const Identity &self, Fd fd)
      : channel_(std::make_shared<Channel>(loop, std::move(fd))),
        handshake_(Handshake::Server(self)) {
    channel_->Start(this);
  }

  void OnFrame(const FrameHeader &header, ByteView payload, Fds * /*fds*/) override {
    Bytes answer = handshake_.OnFrame(header, payload);
    Bytes more = EncodeFrame(FrameType::kData, 1);
    bool is_welcome = handshake_.state() == Handshake::State::kDone;
    if (is_welcome) answer.insert(answer.end(), more.begin(), more.end());
    channel_->Send(std::move(answer));
  }
  void OnClosed(const Status & /*why*/) override {}

 private:
  const std::shared_ptr<Channel> channel_;
  Handshake handshake_;
};

TEST("lanes: a producer that sends over tcp before it is asked fails the pull") {
  Bench bench;
  auto &loop = bench.loop;
  Address address = bench.address;
  address.ip = "127.0.0.1";
  Fd listener = ListenTcp(address.ip, &address.port);
  std::vector<std::unique_ptr<Hasty>> ends;
  loop.Watch(listener.get(), EPOLLIN, [&](uint32_t) {
    ends.push_back(std::make_unique<Hasty>(&loop, bench.self, AcceptOne(listener.get())));
  });
  Memory memory(1);
  std::atomic<int64_t> live{0};
  std::promise<Status> result;
  TcpLane lane(bench.context, address);
  lane.Start(std::make_shared<Pull>(1, KeyOf(1), SpanList(memory.Whole()), &live),
             {.total = 1},
             {},
             [&](const Status &status) { result.set_value(status); });
  bench.copies.Start();
  loop.Start();
  Status status = result.get_future().get();
  loop.Stop();
  bench.copies.Stop();
  CHECK(status.code == Code::kIo);
  CHECK_EQ(ends.size(), 1u);  // the next would be no better
}

TEST("lanes: thousands of pulls at once") {
  constexpr size_t kPulls = 2000;
  constexpr size_t kBytes = 100000;
  for (const LaneCase &one : kRemoteLanes) {
    Memory source(kBytes);
    auto producer = MakeAgent();
    auto consumer = MakeAgent(one.lanes);
    source.FillRandom(1);
    producer->regions().Register(KeyOf(1), source.Cut(3, 1), 1);
    Memory destination(kPulls * kBytes);
    std::vector<PullTicket> tickets;
    for (size_t i = 0; i < kPulls; ++i) {
      auto at = reinterpret_cast<uint64_t>(destination.data() + i * kBytes);
      tickets.push_back(
          consumer->StartPull(producer->address(), KeyOf(1), {{at, kBytes}}));
    }
    for (size_t i = 0; i < kPulls; ++i) {
      CHECK_EQ(Outcome(tickets[i].pull.get()).text, "");
      CHECK(std::equal(
          source.data(), source.data() + kBytes, destination.data() + i * kBytes));
    }
    CHECK_EQ(consumer->Stats().at("connections"), 1);
  }
}

}  // namespace
}  // namespace fixtures
