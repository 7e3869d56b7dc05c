#include <aws/checksums/crc.h>
#include <aws/checksums/private/crc64_priv.h>

#include <atomic>
#include <string>
#include <thread>

#include "fixtures.h"
#include "ray/rdt/checksum.h"

namespace fixtures {
namespace {

constexpr size_t kMiB = 1 << 20;

uint64_t ChecksumOf(const std::vector<Span> &spans) {
  SpanList list(spans);
  return Checksum(list, {0, list.total()});
}

// What the producer says of KeyOf(9).
uint64_t AskedSum(Agent *consumer, const Agent &producer) {
  CallTicket ticket = consumer->StartChecksum(producer.address(), KeyOf(9));
  CHECK_EQ(Outcome(ticket.call.get()).text, "");
  auto answer = Unpack<ChecksumReply>(ticket.call->TakeReply());
  CHECK(answer.has_value());
  return answer->sum;
}

TEST("checksum: of one block it is the CRC-64/NVME that its catalogue gives") {
  std::string text = "123456789";
  CHECK_EQ(ChecksumOf({{reinterpret_cast<uint64_t>(text.data()), text.size()}}),
           0xAE8B14860A799888u);
}

TEST("checksum: each CPU's instructions find what the portable code finds") {
  Memory memory(kMiB + 3);
  memory.FillRandom(1);
  auto *data = reinterpret_cast<const uint8_t *>(memory.data());
  for (int nbytes : {1, 15, 16, 240, 255, 256, 4096, 4099, 1 << 20}) {
    for (int offset : {0, 3}) {
      const uint8_t *part = data + offset;
      uint64_t expected = aws_checksums_crc64nvme_sw(part, nbytes, 0);
      CHECK_EQ(aws_checksums_crc64nvme(part, nbytes, 0), expected);
#ifdef __x86_64__
      if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.2")) {
        CHECK_EQ(aws_checksums_crc64nvme_intel_clmul(part, nbytes, 0), expected);
      }
#endif
    }
  }
}

TEST("checksum: how memory is cut does not matter") {
  for (size_t nbytes : {size_t{1}, kChecksumBlock, kChecksumBlock + 1, 3 * kMiB + 17}) {
    Memory memory(nbytes);
    memory.FillRandom(1);
    for (size_t cuts : {2, 13, 3000}) {
      CHECK_EQ(ChecksumOf(memory.Cut(cuts, 1)), ChecksumOf(memory.Whole()));
    }
  }
  CHECK_EQ(ChecksumOf({}), 0u);
}

TEST("checksum: the parts of whole blocks make up the whole") {
  Memory memory(5 * kChecksumBlock + 5);
  memory.FillRandom(1);
  SpanList list(memory.Whole());
  uint64_t head = Checksum(list, {0, 2 * kChecksumBlock});
  uint64_t tail = Checksum(list, {2 * kChecksumBlock, 3 * kChecksumBlock + 5});
  CHECK_EQ(head + tail, ChecksumOf(memory.Whole()));
}

TEST("checksum: a changed bit and exchanged blocks are found") {
  Memory memory(4 * kChecksumBlock);
  memory.FillRandom(1);
  uint64_t before = ChecksumOf(memory.Whole());
  memory.data()[memory.size() - 1] ^= 1;
  CHECK(ChecksumOf(memory.Whole()) != before);
  memory.data()[memory.size() - 1] ^= 1;
  CHECK_EQ(ChecksumOf(memory.Whole()), before);
  std::swap_ranges(
      memory.data(), memory.data() + kChecksumBlock, memory.data() + kChecksumBlock);
  CHECK(ChecksumOf(memory.Whole()) != before);
}

TEST("checksum: on every lane what lands has the producer's checksum") {
  constexpr LaneSet kSets[] = {0b11111, 0b11000, 0b10000};
  for (LaneSet lanes : kSets) {
    auto producer = MakeAgent();
    auto consumer = MakeAgent(lanes);
    for (size_t nbytes :
         {size_t{0}, size_t{1}, size_t{64} << 10, 3 * kMiB + 17, 20 * kMiB}) {
      for (size_t cuts : {1, 3000}) {
        Memory source(nbytes);
        Memory destination(nbytes);
        source.FillRandom(3);
        CHECK(producer->regions().Register(KeyOf(9), source.Cut(cuts, 1), 1));
        PullTicket ticket = consumer->StartPull(
            producer->address(), KeyOf(9), destination.Cut(cuts / 2 + 1, 2), true);
        CHECK_EQ(Outcome(ticket.pull.get()).text, "");
        CHECK_EQ(ticket.pull->checksum(), ChecksumOf(source.Whole()));
        CHECK_EQ(AskedSum(consumer.get(), *producer), ChecksumOf(source.Whole()));
        CHECK(producer->regions().Release(KeyOf(9)));
        CHECK(AwaitEvent(producer.get(), Event::Kind::kReleased));
      }
    }
  }
}

TEST("checksum: a producer computes it once for concurrent requests") {
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  Memory source(20 * kMiB);
  source.FillRandom(3);
  uint64_t expected = ChecksumOf(source.Whole());
  producer->regions().Register(KeyOf(9), source.Whole(), 1);
  std::vector<CallTicket> tickets;
  for (int i = 0; i < 20; ++i)
    tickets.push_back(consumer->StartChecksum(producer->address(), KeyOf(9)));
  for (const CallTicket &ticket : tickets) {
    CHECK_EQ(Outcome(ticket.call.get()).text, "");
    CHECK_EQ(Unpack<ChecksumReply>(ticket.call->TakeReply())->sum, expected);
  }
  source.data()[0] ^= 1;
  CHECK_EQ(AskedSum(consumer.get(), *producer), expected);
  CHECK_EQ(AskedSum(producer.get(), *producer), expected);
}

TEST("checksum: of an object that is gone there is none") {
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  CallTicket ticket = consumer->StartChecksum(producer->address(), KeyOf(8));
  CHECK(Outcome(ticket.call.get()).text.find("no such object") != std::string::npos);
  CallTicket own = producer->StartChecksum(producer->address(), KeyOf(8));
  CHECK(!Outcome(own.call.get()).ok());
}

TEST("checksum: a number that many threads ask for is told to all, and found by one") {
  LazyChecksum number;
  std::atomic<int> finders{0};
  std::atomic<int> told{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      if (number.Request([&](uint64_t found) { told += found == 5; })) {
        ++finders;
        number.Set(5);
      }
    });
  }
  for (std::thread &thread : threads) thread.join();
  CHECK_EQ(finders.load(), 1);
  CHECK_EQ(told.load(), 8);
}

}  // namespace
}  // namespace fixtures
