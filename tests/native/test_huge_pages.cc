#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <fstream>

#include "fixtures.h"
#include "ray/rdt/huge_pages.h"
#include "ray/rdt/limits.h"
#include "ray/rdt/pool.h"

namespace fixtures {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kNbytes = 2 * limits::kMinCollapsedSpan;

// Anonymous memory of small pages, as torch allocates it. The pages around it keep it
// apart from other mappings in the kernel's books.
class SmallPages {
 public:
  SmallPages() {
    whole_ = static_cast<uint8_t *>(mmap(
        nullptr, kNbytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    data_ = whole_ + kPage;
    mprotect(data_, kNbytes, PROT_READ | PROT_WRITE);
    for (size_t i = 0; i < kNbytes; i += kPage) data_[i] = 1;  // the pages are there
  }
  ~SmallPages() { munmap(whole_, kNbytes + 2 * kPage); }

  void Fill() {
    for (size_t i = 0; i < kNbytes; ++i) data_[i] = static_cast<uint8_t>(i >> 8 ^ i);
  }
  std::vector<Span> Whole() const {
    return {{reinterpret_cast<uint64_t>(data_), kNbytes}};
  }
  bool IsAsWritten() const {
    for (size_t i = 0; i < kNbytes; ++i) {
      if (data_[i] != static_cast<uint8_t>(i >> 8 ^ i)) return false;
    }
    return true;
  }
  // What lies on huge pages, from the kernel's own books.
  size_t HugeBytes() const {
    std::ifstream smaps("/proc/self/smaps");
    std::string line;
    bool is_ours = false;
    size_t kib = 0;
    while (std::getline(smaps, line)) {
      uintptr_t begin = 0, end = 0;
      if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
        uintptr_t data = reinterpret_cast<uintptr_t>(data_);
        is_ours = begin < data + kNbytes && data < end;
      } else if (is_ours && line.starts_with("AnonHugePages:")) {
        kib += std::stoul(line.substr(line.find(':') + 1));
      }
    }
    return kib << 10;
  }

 private:
  uint8_t *whole_;
  uint8_t *data_;
};

// Whether memory gets huge pages if asked for and not otherwise, and a kernel from 6.1.
bool CanTell() {
  std::ifstream mode("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  std::getline(mode, modes);
  size_t nbytes = 2 * Pool::kHugePage;
  void *scratch =
      mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::memset(scratch, 1, nbytes);
  bool can_collapse = madvise(scratch, nbytes, 25 /* MADV_COLLAPSE */) == 0;
  munmap(scratch, nbytes);
  return can_collapse && modes.find("[madvise]") != std::string::npos;
}

// Pulls from `source` into `target` until both are to move to huge pages.
void PullOften(const SmallPages &source, const SmallPages &target, LaneKind lane) {
  auto producer = MakeAgent();
  auto consumer = MakeAgent(LaneBit(lane));
  for (unsigned pull = 1; pull <= limits::kPullsBeforeCollapse; ++pull) {
    producer->regions().Register(KeyOf(1), source.Whole(), pull);
    PullTicket ticket =
        consumer->StartPull(producer->address(), KeyOf(1), target.Whole());
    CHECK(Outcome(ticket.pull.get()).ok());
    CHECK_EQ(ticket.pull->lane(), static_cast<int>(lane));
    producer->regions().Release(KeyOf(1));
    if (pull > 1) continue;
    CHECK_EQ(source.HugeBytes(), 0u);
    CHECK_EQ(target.HugeBytes(), 0u);
  }
  for (const SmallPages *memory : {&source, &target}) {
    CHECK(Await([&] { return memory->HugeBytes() >= limits::kMinCollapsedSpan; }));
    CHECK(memory->IsAsWritten());
  }
  size_t released = 0;
  CHECK(Await([&] {
    for (Event &event : producer->NextEvents(0.1)) released += event.tokens.size();
    return released == limits::kPullsBeforeCollapse;
  }));
}

TEST("huge pages: what is pulled again and again moves there at both ends, each lane") {
  if (!CanTell()) return;
  for (LaneKind lane : {LaneKind::kCma, LaneKind::kShm, LaneKind::kTcp}) {
    SmallPages source, target;
    source.Fill();
    PullOften(source, target, lane);
  }
}

TEST("huge pages: what moved without a pull of the agent's counts when it is said") {
  if (!CanTell()) return;
  auto agent = MakeAgent();
  SmallPages memory;
  memory.Fill();
  for (unsigned time = 1; time < limits::kPullsBeforeCollapse; ++time)
    agent->RecordPull(memory.Whole());
  CHECK(!Await([&] { return memory.HugeBytes() > 0; }, 0.1));
  agent->RecordPull(memory.Whole());
  CHECK(Await([&] { return memory.HugeBytes() >= limits::kMinCollapsedSpan; }));
  CHECK(memory.IsAsWritten());
}

TEST("huge pages: memory that is gone when its turn comes does no harm") {
  auto agent = MakeAgent();
  std::vector<Span> gone = SmallPages().Whole();
  for (unsigned time = 1; time <= 2 * limits::kPullsBeforeCollapse; ++time)
    agent->RecordPull(gone);
  auto consumer = MakeAgent();
  Memory source(kPage), target(kPage);
  source.FillRandom(1);
  agent->regions().Register(KeyOf(1), source.Whole(), 1);
  PullTicket ticket = consumer->StartPull(agent->address(), KeyOf(1), target.Whole());
  CHECK(Outcome(ticket.pull.get()).ok());
  CHECK(target == source);
}

}  // namespace
}  // namespace fixtures
