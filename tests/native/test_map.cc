#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "fixtures.h"
#include "ray/rdt/file_pool.h"

namespace fixtures {
namespace {

constexpr size_t kMiB = 1 << 20;
// A consumer with these always asks for a shared copy.
constexpr LaneSet kNoCma = kAllLanes & ~LaneBit(LaneKind::kCma);

// Blocks of an agent's receive pool, one for each size.
class Blocks {
 public:
  Blocks(Agent *agent, const std::vector<size_t> &sizes) : pool_(agent->pool()) {
    for (size_t nbytes : sizes) {
      spans_.push_back({reinterpret_cast<uint64_t>(pool_->Allocate(nbytes)), nbytes});
    }
  }
  ~Blocks() { Free(); }

  void Free() {
    for (const Span &span : spans_) pool_->Free(At(span), span.nbytes);
    spans_.clear();
  }
  const std::vector<Span> &spans() const { return spans_; }
  uint8_t *at(size_t block) const { return At(spans_[block]); }

  bool Equals(const uint8_t *bytes) const {
    for (const Span &span : spans_) {
      if (std::memcmp(At(span), bytes, span.nbytes) != 0) return false;
      bytes += span.nbytes;
    }
    return true;
  }

 private:
  static uint8_t *At(const Span &span) {
    return reinterpret_cast<uint8_t *>(span.address);
  }

  const std::shared_ptr<Pool> pool_;
  std::vector<Span> spans_;
};

std::vector<Span> Cut(Memory *memory, const std::vector<size_t> &sizes) {
  std::vector<Span> spans;
  uint64_t at = reinterpret_cast<uint64_t>(memory->data());
  for (size_t nbytes : sizes) {
    spans.push_back({at, nbytes});
    at += nbytes;
  }
  return spans;
}

size_t Sum(const std::vector<size_t> &sizes) {
  size_t sum = 0;
  for (size_t nbytes : sizes) sum += nbytes;
  return sum;
}

void PullOver(Agent *producer, Agent *consumer, const Blocks &blocks, LaneKind lane) {
  PullTicket ticket =
      consumer->StartPull(producer->address(), KeyOf(1), blocks.spans(), true);
  CHECK_EQ(Outcome(ticket.pull.get()).text, "");
  CHECK_EQ(ticket.pull->lane(), static_cast<int>(lane));
}

int64_t FreeFiles(const Agent &agent) { return agent.Stats().at("files_free"); }

TEST("map: blocks of every size arrive, and small ones among them") {
  const std::vector<std::vector<size_t>> kObjects = {
      {kMiB},
      {kMiB + 1},
      {100, 3 * kMiB + 77, 5, 70000, kMiB, 64, 20 * kMiB + 4095},
      {64 * kMiB + 1, 2 * kMiB},
      {17 * kMiB, 17 * kMiB, 17 * kMiB},
  };
  for (const std::vector<size_t> &sizes : kObjects) {
    Memory source(Sum(sizes));
    source.FillRandom(1);
    auto producer = MakeAgent();
    auto consumer = MakeAgent(kNoCma);
    producer->regions().Register(KeyOf(1), Cut(&source, sizes), 1);
    Blocks blocks(consumer.get(), sizes);
    PullOver(producer.get(), consumer.get(), blocks, LaneKind::kMap);
    CHECK(blocks.Equals(source.data()));
    // The same bytes, cut in other places: nothing can be mapped in whole.
    Blocks other(consumer.get(), {source.size()});
    PullOver(producer.get(), consumer.get(), other, LaneKind::kMap);
    CHECK(other.Equals(source.data()));
  }
}

TEST("map: small objects and memory of the caller are copied by another lane") {
  Memory source(4 * kMiB);
  auto producer = MakeAgent();
  auto consumer = MakeAgent(kNoCma);
  producer->regions().Register(KeyOf(1), source.Whole(), 1);
  Memory target(4 * kMiB);
  PullTicket ticket = consumer->StartPull(producer->address(), KeyOf(1), target.Whole());
  CHECK_EQ(Outcome(ticket.pull.get()).text, "");
  CHECK_EQ(ticket.pull->lane(), static_cast<int>(LaneKind::kShm));
}

TEST("map: the producer shares what has, or is expected to have, several consumers") {
  Memory source(2 * kMiB);
  source.FillRandom(1);
  auto producer = MakeAgent();
  auto first = MakeAgent();
  auto second = MakeAgent();
  auto third = MakeAgent();
  auto lane_of = [&](Agent *consumer) {
    Blocks blocks(consumer, {source.size()});
    PullTicket ticket =
        consumer->StartPull(producer->address(), KeyOf(1), blocks.spans());
    CHECK_EQ(Outcome(ticket.pull.get()).text, "");
    CHECK(blocks.Equals(source.data()));
    return static_cast<LaneKind>(ticket.pull->lane());
  };
  auto next_object = [&] {
    producer->regions().Release(KeyOf(1));
    producer->regions().Register(KeyOf(1), source.Whole(), 1);
  };
  next_object();
  CHECK(lane_of(first.get()) == LaneKind::kCma);
  CHECK(lane_of(first.get()) == LaneKind::kCma);
  CHECK(lane_of(second.get()) == LaneKind::kMap);
  CHECK(lane_of(third.get()) == LaneKind::kMap);
  next_object();
  CHECK(lane_of(second.get()) == LaneKind::kMap);
  CHECK(lane_of(first.get()) == LaneKind::kMap);
  for (int i = 0; i < 6; ++i) {  // now with one consumer: no longer expected
    next_object();
    lane_of(first.get());
  }
  next_object();
  CHECK(lane_of(first.get()) == LaneKind::kCma);
}

TEST(
    "map: each consumer writes to its own copy, and the producer's later writes stay "
    "away") {
  Memory source(8 * kMiB);
  source.FillRandom(1);
  Memory before = source;
  auto producer = MakeAgent();
  std::vector<std::unique_ptr<Agent>> consumers;
  std::vector<std::unique_ptr<Blocks>> blocks;
  producer->regions().Register(KeyOf(1), source.Whole(), 1);
  for (int i = 0; i < 4; ++i) {
    consumers.push_back(MakeAgent(kNoCma));
    blocks.push_back(
        std::make_unique<Blocks>(consumers[i].get(), std::vector{source.size()}));
    PullOver(producer.get(), consumers[i].get(), *blocks[i], LaneKind::kMap);
    std::memset(blocks[i]->at(0), i, 3 * kMiB);
  }
  std::memset(source.data(), 99, source.size());
  producer->regions().Release(KeyOf(1));
  for (int i = 0; i < 4; ++i) {
    uint8_t *at = blocks[i]->at(0);
    CHECK(std::all_of(at, at + 3 * kMiB, [i](uint8_t byte) { return byte == i; }));
    CHECK(std::equal(at + 3 * kMiB, at + 8 * kMiB, before.data() + 3 * kMiB));
  }
}

TEST("map: files are used again once the last consumer has freed its blocks") {
  Memory source(4 * kMiB);
  auto producer = MakeAgent();
  auto first = MakeAgent(kNoCma);
  auto second = MakeAgent(kNoCma);
  for (int round = 0; round < 8; ++round) {
    source.FillRandom(round);
    producer->regions().Register(KeyOf(1), source.Whole(), 1);
    Blocks a(first.get(), {source.size()});
    Blocks b(second.get(), {source.size()});
    PullOver(producer.get(), first.get(), a, LaneKind::kMap);
    PullOver(producer.get(), second.get(), b, LaneKind::kMap);
    producer->regions().Release(KeyOf(1));
    a.Free();
    CHECK(!Await([&] { return FreeFiles(*producer) > 0; }, 0.05));
    CHECK(b.Equals(source.data()));
    b.Free();
    CHECK(Await([&] { return FreeFiles(*producer) == 4 * kMiB; }));
  }
}

TEST("map: files that a lost consumer may still map are not used again") {
  Memory source(4 * kMiB);
  source.FillRandom(1);
  auto producer = MakeAgent();
  auto consumer = MakeAgent(kNoCma);
  producer->regions().Register(KeyOf(1), source.Whole(), 1);
  Blocks blocks(consumer.get(), {source.size()});
  PullOver(producer.get(), consumer.get(), blocks, LaneKind::kMap);
  consumer->Stop();
  CHECK(AwaitEvent(producer.get(), Event::Kind::kLost).has_value());
  CHECK_EQ(FreeFiles(*producer), 0);
  auto other = MakeAgent(kNoCma);
  Memory next(4 * kMiB);
  next.FillRandom(2);
  producer->regions().Register(KeyOf(2), next.Whole(), 2);
  Blocks others(other.get(), {next.size()});
  PullTicket ticket = other->StartPull(producer->address(), KeyOf(2), others.spans());
  CHECK_EQ(Outcome(ticket.pull.get()).text, "");
  CHECK(others.Equals(next.data()));
  CHECK(blocks.Equals(source.data()));
  producer->Stop();
  CHECK(blocks.Equals(source.data()));
}

TEST("map: a forked child keeps the bytes after its parent freed them") {
  Memory source(4 * kMiB);
  source.FillRandom(1);
  auto producer = MakeAgent();
  auto consumer = MakeAgent(kNoCma);
  producer->regions().Register(KeyOf(1), source.Whole(), 1);
  Blocks blocks(consumer.get(), {source.size()});
  PullOver(producer.get(), consumer.get(), blocks, LaneKind::kMap);
  int go[2];
  CHECK_EQ(pipe(go), 0);
  uint8_t *at = blocks.at(0);
  pid_t child = fork();
  if (child == 0) {
    char byte;
    bool is_told = read(go[0], &byte, 1) == 1;
    _exit(is_told && std::memcmp(at, source.data(), source.size()) == 0 ? 0 : 1);
  }
  blocks.Free();
  CHECK(!Await([&] { return FreeFiles(*producer) > 0; }, 0.2));
  Memory next(4 * kMiB);
  producer->regions().Register(KeyOf(2), next.Whole(), 2);
  Blocks others(consumer.get(), {next.size()});
  PullTicket ticket = consumer->StartPull(producer->address(), KeyOf(2), others.spans());
  CHECK_EQ(Outcome(ticket.pull.get()).text, "");
  CHECK_EQ(write(go[1], "x", 1), 1);
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
}

TEST("map: who receives a file cannot write to it") {
  auto file = MappedFile::Create(kMiB);
  CHECK(file != nullptr);
  Fd fd = file->file()->Duplicate();
  auto map = [&](int flags) {
    return mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, flags, fd.get(), 0);
  };
  CHECK_EQ(pwrite(fd.get(), "x", 1, 0), -1);
  CHECK(map(MAP_SHARED) == MAP_FAILED);
  void *own = map(MAP_PRIVATE);
  CHECK(own != MAP_FAILED);
  *static_cast<char *>(own) = 'x';
  CHECK_EQ(*reinterpret_cast<char *>(file->address()), '\0');
  munmap(own, kMiB);
}

// The memory of the blocks does not change from now on.
void RegisterFrozen(Agent *agent, const Blocks &blocks, int number) {
  CHECK(agent->regions().Register(
      KeyOf(number), blocks.spans(), number, {}, agent->pool().get()));
}

TEST("map: frozen memory in files is mapped without a copy, small parts are copied") {
  const std::vector<size_t> kSizes = {4 * kMiB, 70000, 3 * kMiB + 5};
  Memory source(Sum(kSizes));
  source.FillRandom(1);
  auto producer = MakeAgent();
  std::vector<Span> spans;
  const uint8_t *from = source.data();
  for (size_t nbytes : kSizes) {
    void *memory = producer->pool()->AllocateInFile(nbytes);
    std::memcpy(memory, from, nbytes);
    spans.push_back({reinterpret_cast<uint64_t>(memory), nbytes});
    from += nbytes;
  }
  producer->regions().Register(KeyOf(1), spans, 1, {}, producer->pool().get());
  auto consumer = MakeAgent();
  Blocks blocks(consumer.get(), kSizes);
  PullOver(producer.get(), consumer.get(), blocks, LaneKind::kMap);
  CHECK(blocks.Equals(source.data()));
  producer->regions().Release(KeyOf(1));
  for (const Span &span : spans) {
    producer->pool()->Free(reinterpret_cast<void *>(span.address), span.nbytes);
  }
  CHECK(blocks.Equals(source.data()));
  blocks.Free();
  // The small part was copied; the other files were the caller's.
  CHECK(Await([&] { return FreeFiles(*producer) > 0; }));
  CHECK(FreeFiles(*producer) < static_cast<int64_t>(kMiB));
}

// Three agents: the second passes on what the first one copied into a file.
struct Relay {
  Relay() {
    source.FillRandom(1);
    first->regions().Register(KeyOf(1), source.Whole(), 1);
    PullOver(first.get(), second.get(), received, LaneKind::kMap);
  }
  void PassOn() {
    RegisterFrozen(second.get(), received, 2);
    PullTicket ticket =
        third->StartPull(second->address(), KeyOf(2), passed_on.spans(), true);
    CHECK_EQ(Outcome(ticket.pull.get()).text, "");
    CHECK_EQ(ticket.pull->lane(), static_cast<int>(LaneKind::kMap));
  }
  void EndSecond() {
    second->regions().Release(KeyOf(2));
    received.Free();
  }

  Memory source{4 * kMiB};
  std::unique_ptr<Agent> first = MakeAgent();
  std::unique_ptr<Agent> second = MakeAgent(kNoCma);
  std::unique_ptr<Agent> third = MakeAgent();
  Blocks received{second.get(), {source.size()}};
  Blocks passed_on{third.get(), {source.size()}};
};

TEST("map: a received object is passed on in the file of its first producer") {
  Relay relay;
  relay.PassOn();
  relay.EndSecond();
  CHECK(!Await([&] { return FreeFiles(*relay.first) > 0; }, 0.1));
  CHECK(relay.passed_on.Equals(relay.source.data()));
  relay.passed_on.Free();
  CHECK(Await([&] { return FreeFiles(*relay.first) > 0; }));
  CHECK_EQ(FreeFiles(*relay.second), 0);
}

TEST("map: what its receiver has written to is not passed on in a file") {
  Relay relay;
  relay.received.at(0)[3 * kMiB] ^= 1;
  relay.PassOn();
  *(relay.source.data() + 3 * kMiB) ^= 1;
  CHECK(relay.passed_on.Equals(relay.source.data()));
  relay.passed_on.Free();
  CHECK(Await([&] { return FreeFiles(*relay.second) > 0; }));  // it made a copy
}

TEST("map: a file that a lost consumer got from another consumer is not used again") {
  Relay relay;
  relay.PassOn();
  relay.third->Stop();
  CHECK(AwaitEvent(relay.second.get(), Event::Kind::kLost).has_value());
  relay.EndSecond();
  CHECK(!Await([&] { return FreeFiles(*relay.first) > 0; }, 0.3));
  CHECK(relay.passed_on.Equals(relay.source.data()));
}

TEST("map: many pulls at once, some cancelled, leave nothing behind") {
  Memory source(3 * kMiB);
  source.FillRandom(1);
  auto producer = MakeAgent();
  auto consumer = MakeAgent(kNoCma);
  producer->regions().Register(KeyOf(1), source.Whole(), 1);
  {
    std::vector<std::unique_ptr<Blocks>> blocks;
    std::vector<PullTicket> tickets;
    for (int i = 0; i < 200; ++i) {
      blocks.push_back(
          std::make_unique<Blocks>(consumer.get(), std::vector{source.size()}));
      tickets.push_back(
          consumer->StartPull(producer->address(), KeyOf(1), blocks[i]->spans()));
      if (i % 3 == 0) consumer->Cancel(tickets[i]);
    }
    for (int i = 0; i < 200; ++i) {
      if (i % 3 == 0) continue;
      CHECK_EQ(Outcome(tickets[i].pull.get()).text, "");
      CHECK(blocks[i]->Equals(source.data()));
    }
  }
  CHECK(Await([&] { return producer->Stats().at("pinned") == 0; }));
  CHECK(Await([&] { return consumer->Stats().at("pool_used") == 0; }));
}

TEST("map: a consumer that may not map takes another lane") {
  Memory source(4 * kMiB);
  source.FillRandom(1);
  auto producer = MakeAgent();
  auto consumer = MakeAgent(kAllLanes & ~LaneBit(LaneKind::kMap));
  producer->regions().Register(KeyOf(1), source.Whole(), 1);
  Blocks blocks(consumer.get(), {source.size()});
  PullOver(producer.get(), consumer.get(), blocks, LaneKind::kCma);
  CHECK(blocks.Equals(source.data()));
}

}  // namespace
}  // namespace fixtures
