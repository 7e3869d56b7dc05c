#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>

#include "fixtures.h"
#include "ray/rdt/fd.h"
#include "ray/rdt/read_memory.h"

namespace fixtures {
namespace {

constexpr size_t kMiB = 1 << 20;
constexpr LaneSet kLanes[] = {0b11111, 0b11000, 0b10000};  // best: cma, shm, tcp

// Memory whose second half cannot be read: it is beyond the end of an empty file. It
// keeps its addresses, which an allocator could otherwise use for other memory.
class Torn {
 public:
  explicit Torn(size_t nbytes) : nbytes_(nbytes) {
    constexpr int kReadWrite = PROT_READ | PROT_WRITE;
    memory_ = mmap(nullptr, nbytes, kReadWrite, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory_ != MAP_FAILED);
    Fd empty(memfd_create("empty", MFD_CLOEXEC));
    void *second = static_cast<char *>(memory_) + nbytes / 2;
    CHECK_EQ(mmap(second, nbytes / 2, kReadWrite, MAP_SHARED | MAP_FIXED, empty.get(), 0),
             second);
  }
  ~Torn() { munmap(memory_, nbytes_); }

  std::vector<Span> spans() const {
    return {{reinterpret_cast<uint64_t>(memory_), nbytes_}};
  }

 private:
  const size_t nbytes_;
  void *memory_;
};

Status Pulled(Agent *producer, Agent *consumer, size_t nbytes) {
  Memory destination(nbytes);
  PullTicket ticket =
      consumer->StartPull(producer->address(), KeyOf(1), destination.Whole());
  return Outcome(ticket.pull.get());
}

TEST("read memory: what is not there fails the pull on every lane, and nothing else") {
  for (size_t nbytes : {32 << 10, 24 << 20}) {
    Torn torn(nbytes);
    Memory whole(nbytes);
    auto producer = MakeAgent();
    producer->regions().Register(KeyOf(1), torn.spans(), 1);
    CHECK(Pulled(producer.get(), producer.get(), nbytes).code == Code::kIo);
    for (LaneSet lanes : kLanes) {
      auto consumer = MakeAgent(lanes);
      CHECK(!Pulled(producer.get(), consumer.get(), nbytes).ok());
      Outcome(consumer->StartChecksum(producer->address(), KeyOf(1)).call.get());
      producer->regions().Register(KeyOf(2), whole.Whole(), 2);
      Memory destination(nbytes);
      PullTicket good =
          consumer->StartPull(producer->address(), KeyOf(2), destination.Whole());
      CHECK_EQ(Outcome(good.pull.get()).text, "");
      producer->regions().Release(KeyOf(2));
    }
  }
}

TEST("read memory: a guard that has changed fails the pull on every lane") {
  for (size_t nbytes : {size_t{0}, 32 * kMiB / 1024, 2 * kMiB}) {
    Memory memory(nbytes);
    uint64_t words[2] = {7, 8};
    auto producer = MakeAgent();
    producer->regions().Register(KeyOf(1),
                                 memory.Whole(),
                                 1,
                                 {{reinterpret_cast<uint64_t>(&words[0]), 7},
                                  {reinterpret_cast<uint64_t>(&words[1]), 8}});
    for (uint64_t value : {8, 9}) {
      words[1] = value;
      Code expected = value == 8 ? Code::kOk : Code::kChanged;
      CHECK(Pulled(producer.get(), producer.get(), nbytes).code == expected);
      for (LaneSet lanes : kLanes) {
        auto consumer = MakeAgent(lanes);
        CHECK(Pulled(producer.get(), consumer.get(), nbytes).code == expected);
        CallTicket sum = consumer->StartChecksum(producer->address(), KeyOf(1));
        CHECK_EQ(Outcome(sum.call.get()).ok(), value == 8);
      }
    }
  }
}

// As some containers have it.
void ForbidProcessVmReadv() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{.len = std::size(filter), .filter = filter};
  CHECK_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
  CHECK_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

TEST("read memory: own memory is read where process_vm_readv is forbidden") {
  pid_t child = fork();
  if (child == 0) {
    ForbidProcessVmReadv();
    Memory source(3 * kMiB), destination(3 * kMiB);
    source.FillRandom(1);
    SpanList from(source.Cut(7, 1)), to(destination.Cut(5, 2));
    bool is_read =
        ReadMemory(getpid(), from, to, {0, from.total()}).code == Code::kRefused &&
        ReadOwnMemory(from, to, {0, from.total()}).ok() && source == destination;
    Torn torn(kMiB);
    bool has_failed =
        ReadOwnMemory(SpanList(torn.spans()), {0, kMiB}, destination.data()).code ==
        Code::kIo;
    _exit(is_read && has_failed ? 0 : 1);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST("read memory: a forked child reads its own memory, not its parent's") {
  pid_t child = fork();
  if (child == 0) {
    ForbidProcessVmReadv();
    uint64_t word = 1, got = 0;
    SpanList from({{reinterpret_cast<uint64_t>(&word), sizeof(word)}});
    bool is_read = ReadOwnMemory(from, {0, sizeof(word)}, &got).ok() && got == 1;
    pid_t grandchild = fork();
    word = grandchild == 0 ? 2 : 3;
    is_read &= ReadOwnMemory(from, {0, sizeof(word)}, &got).ok() && got == word;
    int status = 0;
    if (grandchild != 0) waitpid(grandchild, &status, 0);
    _exit(is_read && status == 0 ? 0 : 1);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace fixtures
