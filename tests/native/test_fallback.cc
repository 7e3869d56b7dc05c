// What happens when the better lane is forbidden, or the connection breaks.
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cerrno>
#include <cstddef>

#include "fixtures.h"
#include "ray/rdt/net.h"

namespace fixtures {
namespace {

// From here on process_vm_readv fails with EPERM in this process, as it does in
// containers that forbid it.
bool ForbidCma() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && syscall(SYS_seccomp,
                                                                SECCOMP_SET_MODE_FILTER,
                                                                SECCOMP_FILTER_FLAG_TSYNC,
                                                                &program) == 0;
}

constexpr size_t kBytes = 3 << 20;

// Pulls what a Producer of kBytes serves; true if that came over `lane`.
bool PullsOver(Agent *consumer, const Bytes &address, LaneKind lane) {
  Memory expected(kBytes);
  Memory destination(kBytes);
  expected.FillRandom(1);
  PullTicket ticket = consumer->StartPull(address, KeyOf(1), destination.Cut(3, 1));
  return Outcome(ticket.pull.get()).ok() && destination == expected &&
         ticket.pull->lane() == static_cast<int>(lane);
}

// Runs `body` in a child that is forked before any thread of the child's.
bool InChild(const std::function<bool()> &body) {
  pid_t pid = fork();
  if (pid == 0) _exit(body() ? 0 : 1);
  int status = -1;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST("fallback: where cma is forbidden, shm is used and the reason said") {
  Producer producer(kBytes, kAllLanes);
  CHECK(InChild([&] {
    auto consumer = MakeAgent();
    if (!ForbidCma() || !PullsOver(consumer.get(), producer.address(), LaneKind::kShm)) {
      return false;
    }
    std::string reason = consumer->Explain(producer.address())[1];
    return reason.find("Operation not permitted") != std::string::npos;
  }));
}

TEST("fallback: cma that is forbidden later gives way to shm in the same pull") {
  Producer producer(kBytes, kAllLanes);
  CHECK(InChild([&] {
    auto consumer = MakeAgent();
    return PullsOver(consumer.get(), producer.address(), LaneKind::kCma) && ForbidCma() &&
           PullsOver(consumer.get(), producer.address(), LaneKind::kShm) &&
           PullsOver(consumer.get(), producer.address(), LaneKind::kShm);
  }));
}

TEST("fallback: an object in too many pieces for cma takes another lane") {
  constexpr size_t kPieces = (kMaxFrame / sizeof(Span)) + 1;
  Memory source(kPieces);
  Memory destination(kPieces);
  source.FillRandom(1);
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  std::vector<Span> pieces;
  for (size_t i = 0; i < kPieces; ++i) {
    pieces.push_back({reinterpret_cast<uint64_t>(source.data() + i), 1});
  }
  producer->Register(KeyOf(1), pieces, 1);
  PullTicket ticket =
      consumer->StartPull(producer->address(), KeyOf(1), destination.Whole());
  CHECK_EQ(Outcome(ticket.pull.get()).text, "");
  CHECK_EQ(ticket.pull->lane(), static_cast<int>(LaneKind::kShm));
  CHECK(source == destination);
}

TEST("fallback: a connection that breaks before the grant is made once more") {
  Loop loop("test");
  EventQueue events;
  Log log(&events);
  Identity identity{.secret = "secret", .lanes = kAllLanes};
  identity.agent.fill(5);
  Address address = DescribeThisProcess(identity.agent);
  std::atomic<int> entered{0};
  Door door(
      &loop, identity, &log, [&](std::shared_ptr<Channel> channel, const PeerFacts &) {
        ++entered;
        channel->Close();
      });
  door.ListenOn(ListenUnix(identity.agent), true, 5);
  loop.Start();
  auto consumer = MakeAgent();
  PullTicket ticket = consumer->StartPull(Pack(address), KeyOf(1), {});
  CHECK(Outcome(ticket.pull.get()).code == Code::kPeerLost);
  CHECK_EQ(entered.load(), 2);
  loop.Stop();
}

TEST("fallback: the choice of lanes follows the facts") {
  LaneFacts near{
      .mine = kAllLanes, .theirs = kAllLanes, .is_unix = true, .has_tcp = true};
  CHECK(UsableLanes(JudgeLanes(near)) ==
        (std::vector{LaneKind::kCma, LaneKind::kShm, LaneKind::kTcp}));
  near.cma_probe_error = "not permitted";
  CHECK_EQ(JudgeLanes(near)[1], "not permitted");
  LaneFacts far{.mine = kAllLanes, .theirs = kAllLanes, .has_tcp = true};
  CHECK(UsableLanes(JudgeLanes(far)) == std::vector{LaneKind::kTcp});
  far.has_tcp = false;
  far.no_tcp_reason = "TLS is required";
  CHECK(UsableLanes(JudgeLanes(far)).empty());
  CHECK_EQ(JudgeLanes(far)[3], "TLS is required");
}

}  // namespace
}  // namespace fixtures
