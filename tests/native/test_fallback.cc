// What happens when the better lane is forbidden, or the connection breaks.
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "fixtures.h"
#include "ray/rdt/limits.h"
#include "ray/rdt/net.h"

namespace fixtures {
namespace {

bool Install(std::vector<sock_filter> filter) {
  sock_fprog program{.len = static_cast<unsigned short>(filter.size()),
                     .filter = filter.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && syscall(SYS_seccomp,
                                                                SECCOMP_SET_MODE_FILTER,
                                                                SECCOMP_FILTER_FLAG_TSYNC,
                                                                &program) == 0;
}

// From here on that system call fails in this process.
bool Forbid(uint32_t call, uint32_t error) {
  return Install({
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  });
}

// The same for private mappings of files at a fixed address.
bool ForbidFixedMappings() {
  return Install({
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[3])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MAP_PRIVATE | MAP_FIXED, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOMEM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  });
}

// As in containers that forbid it.
bool ForbidCma() { return Forbid(SYS_process_vm_readv, EPERM); }

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
    std::string reason = ReasonOf(consumer->Explain(producer.address()), LaneKind::kCma);
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
  constexpr size_t kPieces = (limits::kMaxFrame / sizeof(Span)) + 1;
  Memory source(kPieces);
  Memory destination(kPieces);
  source.FillRandom(1);
  auto producer = MakeAgent();
  auto consumer = MakeAgent();
  std::vector<Span> pieces;
  for (size_t i = 0; i < kPieces; ++i) {
    pieces.push_back({reinterpret_cast<uint64_t>(source.data() + i), 1});
  }
  producer->regions().Register(KeyOf(1), pieces, 1);
  PullTicket ticket =
      consumer->StartPull(producer->address(), KeyOf(1), destination.Whole());
  CHECK_EQ(Outcome(ticket.pull.get()).text, "");
  CHECK_EQ(ticket.pull->lane(), static_cast<int>(LaneKind::kShm));
  CHECK(source == destination);
}

TEST("fallback: a connection that breaks before the grant is made a few times more") {
  Bench bench;
  auto &loop = bench.loop;
  std::atomic<int> entered{0};
  Acceptor acceptor(bench.context,
                    [&](std::shared_ptr<Channel> channel, const PeerInfo &) {
                      ++entered;
                      channel->Close();
                    });
  acceptor.ListenOn(ListenUnix(bench.self.agent), true);
  loop.Start();
  auto consumer = MakeAgent();
  PullTicket ticket = consumer->StartPull(Pack(bench.address), KeyOf(1), {});
  CHECK(Outcome(ticket.pull.get()).code == Code::kPeerLost);
  CHECK_EQ(entered.load(), 5);
  loop.Stop();
}

// Breaks all connections of this process; the other ends see that at once.
void CutConnections() {
  for (int fd = 3; fd < 1024; ++fd) {
    int listens = 0;
    socklen_t length = sizeof(listens);
    getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length);
    if (!listens) shutdown(fd, SHUT_RDWR);
  }
}

TEST("fallback: a pull whose connections break goes on over new ones") {
  constexpr size_t kLarge = 64 << 20;
  for (LaneSet lanes : {0b11100, 0b11000, 0b10000}) {
    Producer producer(kLarge, kAllLanes);
    auto consumer = MakeAgent(lanes);
    auto expected = std::make_unique<Memory>(kLarge);
    auto destination = std::make_unique<Memory>(kLarge);
    expected->FillRandom(1);
    PullTicket ticket =
        consumer->StartPull(producer.address(), KeyOf(1), destination->Whole());
    uint64_t before = 0;
    for (uint64_t cut = 1; cut <= 2; ++cut) {
      // Something lands, so there is a connection.
      CHECK(Await([&] {
        return ticket.pull->received_bytes() > before || ticket.pull->is_settled();
      }));
      before = ticket.pull->received_bytes();
      CutConnections();
      CHECK(Await(
          [&] { return ticket.pull->attempt() >= cut || ticket.pull->is_settled(); }));
      CHECK(ticket.pull->received_bytes() >= before);
    }
    CHECK_EQ(Outcome(ticket.pull.get()).text, "");
    CHECK(*destination == *expected);
  }
}

TEST("fallback: where connections break, only calls that may be are repeated") {
  auto server = MakeAgent();
  auto client = MakeAgent();
  CallTicket often = client->StartCall(server->address(), Bytes{'o'}, true);
  CHECK(AwaitEvent(server.get(), Event::Kind::kCall));
  CallTicket once = client->StartCall(server->address(), Bytes{'1'});
  CHECK(AwaitEvent(server.get(), Event::Kind::kCall));
  CutConnections();
  Status broken = Outcome(once.call.get(), 5);
  CHECK(broken.code == Code::kBroken);
  std::optional<Event> again = AwaitEvent(server.get(), Event::Kind::kCall);
  CHECK(again && again->payload == Bytes{'o'});
  server->Reply(again->call, Bytes{'!'}, false);
  CHECK(Outcome(often.call.get(), 5).ok());
  CHECK(often.call->TakeReply() == Bytes{'!'});
}

// TCP sockets of this process that are connected: those of data connections.
std::vector<int> DataConnections() {
  std::vector<int> found;
  for (int fd = 3; fd < 1024; ++fd) {
    sockaddr_storage name{};
    socklen_t length = sizeof(name);
    getpeername(fd, reinterpret_cast<sockaddr *>(&name), &length);
    tcp_info info{};
    length = sizeof(info);
    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length);
    if (name.ss_family == AF_INET && info.tcpi_state == TCP_ESTABLISHED)
      found.push_back(fd);
  }
  return found;
}

TEST("fallback: one data connection after another breaks, and the pull goes on") {
  constexpr size_t kLarge = 256 << 20;
  Producer producer(kLarge, kAllLanes);
  auto consumer = MakeAgent(0b10000);
  auto expected = std::make_unique<Memory>(kLarge);
  auto destination = std::make_unique<Memory>(kLarge);
  expected->FillRandom(1);
  PullTicket ticket =
      consumer->StartPull(producer.address(), KeyOf(1), destination->Whole());
  for (int cut = 0; cut < 8; ++cut) {
    // What lands from here on came over connections that were made since the last cut.
    CHECK(Await([] { return !DataConnections().empty(); }));
    uint64_t before = ticket.pull->received_bytes();
    CHECK(Await([&] { return ticket.pull->received_bytes() > before; }));
    for (int fd : DataConnections()) shutdown(fd, SHUT_RDWR);
  }
  CHECK_EQ(Outcome(ticket.pull.get()).text, "");
  CHECK(*destination == *expected);
  CHECK_EQ(ticket.pull->attempt(), 0u);  // the control connection is a Unix socket
}

// Counts the FREE frames that come, and answers like an agent.
class Clerk : public Channel::Handler {
 public:
  void OnFrame(const FrameHeader &header, ByteView /*payload*/, Fds * /*fds*/) override {
    frees += header.type == FrameType::kFree;
    if (header.type == FrameType::kPing)
      channel->Send(EncodeFrame(FrameType::kPong, header.request));
  }
  void OnClosed(const Status & /*why*/) override {}

  std::shared_ptr<Channel> channel;
  std::atomic<int> frees{0};
};

TEST("fallback: a free that is lost with its connection is sent again, and then not") {
  Bench bench;
  auto &loop = bench.loop;
  Clerk clerk;
  std::atomic<int> entered{0};
  Acceptor acceptor(bench.context,
                    [&](std::shared_ptr<Channel> channel, const PeerInfo &) {
                      if (++entered == 1) return channel->Close();
                      clerk.channel = std::move(channel);
                      clerk.channel->set_handler(&clerk);
                    });
  acceptor.ListenOn(ListenUnix(bench.self.agent), true);
  loop.Start();
  auto owner = MakeAgent();
  owner->Notify(Pack(bench.address), Notice::kFree, KeyOf(1));
  CHECK(Await([&] { return clerk.frees == 1; }, 10));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // the answer arrives
  loop.Post([&] { clerk.channel->Close(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  CHECK_EQ(clerk.frees.load(), 1);
  CHECK_EQ(entered.load(), 2);
  owner.reset();
  loop.Stop();
}

// Twice: a thread that starts may hold one for a moment.
std::vector<Fd> AllDescriptors() {
  std::vector<Fd> taken;
  for (int i = 0; i < 2; ++i) {
    do {
      taken.emplace_back(dup(0));
    } while (taken.back());
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  return taken;
}

TEST("fallback: without a free descriptor a pull waits for one, then says so") {
  Producer producer(1 << 20, kAllLanes);
  CHECK(InChild([&] {
    rlimit limit{.rlim_cur = 256, .rlim_max = 256};
    setrlimit(RLIMIT_NOFILE, &limit);
    auto waiting = MakeAgent();
    Memory destination(1 << 20);
    std::vector<Fd> taken = AllDescriptors();
    PullTicket ticket =
        waiting->StartPull(producer.address(), KeyOf(1), destination.Whole());
    if (ticket.pull->Wait(0.2)) return false;
    for (int i = 0; i < 8; ++i) taken.erase(taken.begin());
    if (!Outcome(ticket.pull.get()).ok()) return false;

    Settings settings = TestSettings();
    settings.connect_timeout_s = 0.3;
    taken.clear();
    Agent impatient("secret", settings);
    taken = AllDescriptors();
    ticket = impatient.StartPull(producer.address(), KeyOf(1), destination.Whole());
    Status status = Outcome(ticket.pull.get());
    return status.code == Code::kIo &&
           status.text.find("Too many open files") != std::string::npos;
  }));
}

// The lanes of three consumers that pull an object into their receive pools, in turn.
// Empty if the bytes are wrong.
std::vector<int> LanesOfThree(Agent *producer, size_t nbytes) {
  Memory source(nbytes);
  source.FillRandom(1);
  producer->regions().Register(KeyOf(1), source.Whole(), 1);
  std::vector<int> lanes;
  std::vector<std::unique_ptr<Agent>> consumers;
  for (int i = 0; i < 3; ++i) {
    consumers.push_back(MakeAgent());
    Agent *consumer = consumers.back().get();
    void *block = consumer->pool()->Allocate(nbytes);
    PullTicket ticket = consumer->StartPull(
        producer->address(), KeyOf(1), {{reinterpret_cast<uint64_t>(block), nbytes}});
    if (!Outcome(ticket.pull.get()).ok() ||
        std::memcmp(block, source.data(), nbytes) != 0) {
      return {};
    }
    lanes.push_back(ticket.pull->lane());
    consumer->pool()->Free(block, nbytes);
  }
  return lanes;
}

TEST("fallback: without memfds each consumer gets a copy") {
  CHECK(InChild([] {
    auto producer = MakeAgent();
    if (!Forbid(SYS_memfd_create, ENOSYS)) return false;
    return LanesOfThree(producer.get(), kBytes) ==
           std::vector<int>(3, static_cast<int>(LaneKind::kCma));
  }));
}

TEST("fallback: without mappings of files each consumer gets a copy, said once") {
  CHECK(InChild([] {
    auto producer = MakeAgent();
    if (!ForbidFixedMappings()) return false;
    return LanesOfThree(producer.get(), kBytes) ==
           std::vector<int>(3, static_cast<int>(LaneKind::kCma));
  }));
}

TEST("fallback: without a way to watch its connection a pull says so") {
  Producer producer(1000, kAllLanes);
  CHECK(InChild([&] {
    Settings settings = TestSettings();
    settings.connect_timeout_s = 0.3;
    Agent consumer("secret", settings);
    Memory destination(1000);
    if (!Forbid(SYS_epoll_ctl, ENOSPC)) return false;
    PullTicket ticket =
        consumer.StartPull(producer.address(), KeyOf(1), destination.Whole());
    Status status = Outcome(ticket.pull.get());
    return status.code == Code::kIo &&
           status.text.find("No space left") != std::string::npos;
  }));
}

std::vector<LaneKind> UsableLanes(const LaneReasons &reasons) {
  std::vector<LaneKind> usable;
  for (size_t i = 0; i < kLaneCount; ++i) {
    if (reasons[i] == "ok") usable.push_back(static_cast<LaneKind>(i));
  }
  return usable;
}

TEST("fallback: the choice of lanes follows the facts") {
  LaneInputs near{.mine = kAllLanes, .theirs = kAllLanes, .is_unix = true};
  CHECK(UsableLanes(EvaluateLanes(near)) ==
        (std::vector{LaneKind::kMap, LaneKind::kCma, LaneKind::kShm, LaneKind::kTcp}));
  near.cma_probe_error = "not permitted";
  CHECK_EQ(ReasonOf(EvaluateLanes(near), LaneKind::kCma), "not permitted");
  LaneInputs far{.mine = kAllLanes, .theirs = kAllLanes};
  CHECK(UsableLanes(EvaluateLanes(far)) == std::vector{LaneKind::kTcp});
  far.no_tcp_reason = "TLS is required";
  CHECK(UsableLanes(EvaluateLanes(far)).empty());
  CHECK_EQ(ReasonOf(EvaluateLanes(far), LaneKind::kTcp), "TLS is required");
}

}  // namespace
}  // namespace fixtures
