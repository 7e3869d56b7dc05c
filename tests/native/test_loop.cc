// What becomes of a descriptor that the system does not watch.
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <future>

#include "fixtures.h"
#include "ray/rdt/lanes/tcp_source.h"
#include "ray/rdt/lanes/tcp_stream.h"
#include "ray/rdt/net.h"

namespace fixtures {
namespace {

// Of a file: epoll takes none.
Fd Unwatchable() { return Fd(memfd_create("test", MFD_CLOEXEC)); }

TEST("loop: what cannot be watched has no id, and nothing is done for that") {
  Loop loop("test");
  Fd fd = Unwatchable();
  CHECK_EQ(loop.Watch(fd.get(), EPOLLIN, [](uint32_t) {}), 0u);
  CHECK_EQ(errno, EPERM);
  loop.Rearm(0, EPOLLIN);
  loop.Unwatch(0);
}

class Ending : public Channel::Handler {
 public:
  void OnFrame(const FrameHeader &, ByteView, Fds *) override {}
  void OnClosed(const Status &status) override { why.set_value(status); }

  std::promise<Status> why;
};

TEST("loop: a channel that cannot be watched ends after its start") {
  Loop loop("test");
  Ending ending;
  auto why = ending.why.get_future();
  auto channel = std::make_shared<Channel>(&loop, Unwatchable());
  channel->Start(&ending);
  channel->Send(EncodeFrame(FrameType::kPing, 1));
  CHECK(why.wait_for(std::chrono::seconds(0)) == std::future_status::timeout);
  loop.Start();
  bool has_ended = why.wait_for(std::chrono::seconds(10)) == std::future_status::ready;
  loop.Stop();
  CHECK(has_ended);
  Status status = why.get();
  CHECK(status.code == Code::kIo);
  CHECK(status.text.find("Operation not permitted") != std::string::npos);
}

TEST("loop: a socket that cannot be watched is reported, and watched later") {
  Bench bench;
  auto &loop = bench.loop;
  Acceptor acceptor(bench.context,
                    [](const std::shared_ptr<Channel> &, const PeerInfo &) {});
  Fd fd = Unwatchable();
  int number = fd.get();
  acceptor.ListenOn(std::move(fd), true);
  CHECK_EQ(bench.events.Next(0).size(), 1u);
  Fd listener = ListenUnix(bench.self.agent);
  CHECK_EQ(dup2(listener.get(), number), number);  // now it can
  loop.Start();
  Fd caller = ConnectUnix(bench.self.agent);
  Bytes no_frame(sizeof(FrameHeader));
  send(caller.get(), no_frame.data(), no_frame.size(), MSG_NOSIGNAL);
  bool is_answered = Await([&] { return IsHungUp(caller.get()); });
  loop.Stop();
  CHECK(is_answered);
}

TEST("loop: of a data connection that cannot be watched both ends close") {
  Loop loop("test");
  bool is_broken = false;
  auto stream = std::make_shared<TcpStream>(
      &loop, Unwatchable(), std::make_shared<TcpQueue>(), [&] { is_broken = true; });
  stream->Start();
  CHECK(is_broken);
  Fd fd = Unwatchable();
  int number = fd.get();
  auto source = std::make_shared<TcpSource>(
      &loop, std::move(fd), AgentId{}, std::make_shared<PinTable>());
  source->Start();
  CHECK_EQ(fcntl(number, F_GETFD), -1);
}

}  // namespace
}  // namespace fixtures
