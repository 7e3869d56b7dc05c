#include <sys/socket.h>

#include <random>
#include <thread>

#include "fixtures.h"
#include "ray/rdt/net.h"

namespace fixtures {
namespace {

Bytes BytesOf(const std::string &text) { return Bytes(text.begin(), text.end()); }

Address Parse(const Agent &agent) { return *ParseAddress(agent.address()); }

// Answers every call with "<payload>!" until it is told to stop.
class Responder {
 public:
  explicit Responder(Agent *agent) : thread_([this, agent] { Run(agent); }) {}
  ~Responder() {
    is_stopping_ = true;
    thread_.join();
  }

 private:
  void Run(Agent *agent) {
    while (!is_stopping_) {
      for (Event &event : agent->NextEvents(0.05)) {
        if (event.kind != Event::Kind::kCall) continue;
        bool is_error = event.payload == BytesOf("fail");
        event.payload.push_back('!');
        agent->Reply(event.call, event.payload, is_error);
      }
    }
  }

  std::atomic<bool> is_stopping_{false};
  std::thread thread_;
};

TEST("agent: a call reaches the other side and its answer comes back") {
  auto server = MakeAgent();
  auto client = MakeAgent();
  Responder responder(server.get());
  for (Agent *from : {client.get(), server.get()}) {
    CallTicket good = from->StartCall(server->address(), BytesOf("hello"));
    CHECK(Outcome(good.call.get()).ok());
    CHECK(good.call->TakeReply() == BytesOf("hello!"));
    CallTicket bad = from->StartCall(server->address(), BytesOf("fail"));
    CHECK(Outcome(bad.call.get()).code == Code::kRefused);
    CHECK_EQ(bad.call->status().text, "fail!");
  }
}

TEST("agent: large calls and many at once") {
  auto server = MakeAgent();
  auto client = MakeAgent();
  Responder responder(server.get());
  CallTicket large = client->StartCall(server->address(), Bytes(5 << 20, 'x'));
  std::vector<CallTicket> calls;
  for (int i = 0; i < 1000; ++i)
    calls.push_back(client->StartCall(server->address(), {}));
  CHECK(Outcome(large.call.get()).ok());
  CHECK_EQ(large.call->TakeReply().size(), (5u << 20) + 1);
  for (auto &call : calls) CHECK(Outcome(call.call.get()).ok());
}

TEST("agent: a call over the frame limit fails and affects no other call") {
  auto server = MakeAgent();
  auto client = MakeAgent();
  Responder responder(server.get());
  CallTicket large = client->StartCall(server->address(), Bytes((64 << 20) + 1, 'x'));
  CHECK(Outcome(large.call.get()).code == Code::kRefused);
  CallTicket small = client->StartCall(server->address(), BytesOf("a"));
  CHECK(Outcome(small.call.get()).ok());
}

TEST("agent: a free releases the region there, after the pulls under way") {
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  Memory memory(1000);
  for (uint8_t i = 0; i < 100; ++i)
    producer->regions().Register(KeyOf(i), memory.Whole(), i);
  for (uint8_t i = 0; i < 100; ++i)
    consumer->Notify(producer->address(), Notice::kFree, KeyOf(i));
  size_t released = 0;
  CHECK(Await([&] {
    for (Event &event : producer->NextEvents(0.1)) released += event.tokens.size();
    return released == 100;
  }));
  PullTicket late = consumer->StartPull(producer->address(), KeyOf(1), memory.Whole());
  CHECK(Outcome(late.pull.get()).code == Code::kNotFound);
  producer->regions().Register(KeyOf(1), memory.Whole(), 7);
  producer->Notify(producer->address(), Notice::kFree, KeyOf(1));
  CHECK(AwaitEvent(producer.get(), Event::Kind::kReleased));
}

TEST("agent: the frees of a burst arrive, also those before the agent's end") {
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  Memory memory(1000);
  for (uint8_t i = 0; i < 100; ++i)
    producer->regions().Register(KeyOf(i), memory.Whole(), i);
  PullTicket first = consumer->StartPull(producer->address(), KeyOf(0), memory.Whole());
  CHECK(Outcome(first.pull.get()).ok());
  for (uint8_t i = 0; i < 100; ++i) {
    consumer->Notify(producer->address(), Notice::kFree, KeyOf(i));
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  consumer->Stop();
  size_t released = 0;
  CHECK(Await([&] {
    for (Event &event : producer->NextEvents(0.1)) released += event.tokens.size();
    return released == 100;
  }));
}

TEST("agent: a free for a peer that is gone is dropped") {
  auto consumer = MakeAgent();
  Bytes gone = MakeAgent()->address();
  consumer->Notify(gone, Notice::kFree, KeyOf(1));
  Memory memory(8);
  PullTicket ticket = consumer->StartPull(gone, KeyOf(1), memory.Whole());
  CHECK(Outcome(ticket.pull.get()).code == Code::kUnreachable);
}

TEST("agent: another secret is an auth error on both sides") {
  Agent stranger("other secret", TestSettings());
  auto producer = MakeAgent();
  Memory memory(8);
  PullTicket ticket = stranger.StartPull(producer->address(), KeyOf(1), memory.Whole());
  CHECK(Outcome(ticket.pull.get()).code == Code::kAuth);
  auto log = AwaitEvent(producer.get(), Event::Kind::kLog);
  CHECK(log && log->text.find("authentication failed") != std::string::npos);
}

TEST("agent: an address of another version names both versions") {
  auto consumer = MakeAgent();
  Address address = Parse(*MakeAgent());
  address.version = 5;
  PullTicket ticket = consumer->StartPull(Pack(address), KeyOf(1), {});
  CHECK(Outcome(ticket.pull.get()).code == Code::kVersion);
  CHECK(ticket.pull->status().text.find("version 5") != std::string::npos);
}

TEST("agent: malformed arguments are refused at once") {
  auto agent = MakeAgent();
  bool threw = false;
  try {
    agent->StartPull(BytesOf("nonsense"), KeyOf(1), {});
  } catch (const std::invalid_argument &) {
    threw = true;
  }
  CHECK(threw);
}

TEST("agent: garbage on its sockets is dropped and everyone else served") {
  Memory source(3 << 20);
  auto producer = MakeAgent();
  auto consumer = MakeAgent(0b10000);
  source.FillRandom(1);
  producer->regions().Register(KeyOf(1), source.Whole(), 1);
  Address address = Parse(*producer);
  std::minstd_rand random(1);
  for (int i = 0; i < 200; ++i) {
    Fd fd =
        i % 2 == 0 ? ConnectTcp(address.ip, address.port) : ConnectUnix(address.agent);
    CHECK(static_cast<bool>(fd));
    Bytes garbage(random() % 2000 + 1);
    for (uint8_t &byte : garbage) byte = static_cast<uint8_t>(random() >> 8);
    if (i % 3 == 0)
      garbage = EncodeFrame(FrameType::kPull, 1, PullRequest{.key = KeyOf(1)});
    if (i % 5 == 0) garbage = EncodeFrame(FrameType::kHello, 1, ByteView(Bytes(600)));
    CHECK(Await([&] { return SocketError(fd.get()) == 0; }));
    send(fd.get(), garbage.data(), garbage.size(), MSG_NOSIGNAL);
    if (i % 50 != 0) continue;
    Memory destination(source.size());
    PullTicket ticket =
        consumer->StartPull(producer->address(), KeyOf(1), destination.Whole());
    CHECK_EQ(Outcome(ticket.pull.get()).text, "");
    CHECK(source == destination);
  }
  size_t lines = 0;
  for (Event &event : producer->NextEvents(0)) lines += event.kind == Event::Kind::kLog;
  CHECK(lines > 0 && lines < 100);
}

TEST("agent: many silent connections do not block a client with the secret") {
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  Memory memory(8);
  producer->regions().Register(KeyOf(1), memory.Whole(), 1);
  std::vector<Fd> silent;
  for (int i = 0; i < 200; ++i) silent.push_back(ConnectUnix(Parse(*producer).agent));
  PullTicket ticket = consumer->StartPull(producer->address(), KeyOf(1), memory.Whole());
  CHECK(Outcome(ticket.pull.get(), 4).ok());
}

TEST("agent: TLS being required rules out clear-text connections") {
  Settings settings = TestSettings();
  settings.clear_tcp = false;
  Agent consumer("secret", settings);
  auto producer = MakeAgent();
  Address far = Parse(*producer);
  far.net_namespace += 1;
  Memory memory(8);
  PullTicket ticket = consumer.StartPull(Pack(far), KeyOf(1), memory.Whole());
  CHECK(Outcome(ticket.pull.get()).code == Code::kRefused);
  CHECK(ticket.pull->status().text.find("TLS is required") != std::string::npos);
  CHECK_EQ(Parse(consumer).port, 0);
}

TEST("agent: a peer on another network namespace is reached over TCP") {
  Memory source(2 << 20);
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  Memory destination(2 << 20);
  source.FillRandom(1);
  producer->regions().Register(KeyOf(1), source.Whole(), 1);
  Address far = Parse(*producer);
  far.net_namespace += 1;
  PullTicket ticket = consumer->StartPull(Pack(far), KeyOf(1), destination.Whole());
  CHECK_EQ(Outcome(ticket.pull.get()).text, "");
  CHECK_EQ(ticket.pull->lane(), static_cast<int>(LaneKind::kTcp));
  CHECK(source == destination);
}

TEST("agent: a pull from a silent address ends after the connect timeout") {
  Settings settings = TestSettings();
  settings.connect_timeout_s = 0.2;
  Agent consumer("secret", settings);
  // A listener that never accepts.
  uint16_t port = 0;
  Fd listener = ListenTcp("127.0.0.1", &port);
  Address far = Parse(consumer);
  far.agent.fill(3);
  far.net_namespace += 1;
  far.port = port;
  PullTicket ticket = consumer.StartPull(Pack(far), KeyOf(1), {});
  CHECK(Outcome(ticket.pull.get(), 5).code == Code::kUnreachable);
}

TEST("agent: stop fails what waits and brings every token back") {
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  Memory memory(100);
  producer->regions().Register(KeyOf(1), memory.Whole(), 5);
  CallTicket call = consumer->StartCall(producer->address(), {});
  CHECK(AwaitEvent(producer.get(), Event::Kind::kCall));
  consumer->Stop();
  consumer->Stop();
  CHECK(Outcome(call.call.get()).code == Code::kStopped);
  CHECK(Outcome(consumer->StartPull(producer->address(), KeyOf(1), {}).pull.get()).code ==
        Code::kStopped);
  producer->Stop();
  std::vector<Event> events = producer->NextEvents(0);
  CHECK(!events.empty() && events.back().kind == Event::Kind::kStopped);
  CHECK(events.front().tokens == std::vector<int64_t>{5});
}

TEST("agent: pulls fail when the producer stops") {
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  CallTicket call = consumer->StartCall(producer->address(), {});
  CHECK(AwaitEvent(producer.get(), Event::Kind::kCall));
  producer->Stop();
  CHECK(Outcome(call.call.get(), 5).code == Code::kPeerLost);
  CHECK(AwaitEvent(consumer.get(), Event::Kind::kLost));
}

TEST("agent: two agents pull from each other at the same time") {
  Memory source(1 << 20);
  auto a = MakeAgent();
  auto b = MakeAgent();
  source.FillRandom(1);
  a->regions().Register(KeyOf(1), source.Whole(), 1);
  b->regions().Register(KeyOf(1), source.Whole(), 1);
  for (int i = 0; i < 50; ++i) {
    Memory to_a(source.size());
    Memory to_b(source.size());
    PullTicket from_b = a->StartPull(b->address(), KeyOf(1), to_a.Whole());
    PullTicket from_a = b->StartPull(a->address(), KeyOf(1), to_b.Whole());
    CHECK(Outcome(from_b.pull.get()).ok());
    CHECK(Outcome(from_a.pull.get()).ok());
    CHECK(to_a == source && to_b == source);
  }
}

TEST("agent: a peer that stops answering is lost after the peer timeout") {
  Settings settings = TestSettings();
  settings.peer_timeout_s = 1;
  Agent consumer("secret", settings);
  Producer producer(1 << 20, kAllLanes);
  Memory memory(1 << 20);
  CHECK(
      Outcome(consumer.StartPull(producer.address(), KeyOf(1), memory.Whole()).pull.get())
          .ok());
  producer.Stop();
  PullTicket ticket = consumer.StartPull(producer.address(), KeyOf(1), memory.Whole());
  Status status = Outcome(ticket.pull.get(), 20);
  CHECK(status.code == Code::kPeerLost || status.code == Code::kUnreachable);
}

}  // namespace
}  // namespace fixtures
