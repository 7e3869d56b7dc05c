#include "fixtures.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <algorithm>
#include <thread>

extern char **environ;

namespace fixtures {

Settings TestSettings(LaneSet lanes) {
  return {.bind_ip = "127.0.0.1",
          .lanes = lanes,
          .copy_threads = 2,
          .tcp_streams = 3,
          .pool_bytes = 64 << 20,
          .connect_timeout_s = 5,
          .peer_timeout_s = 20,
          .clear_tcp = true};
}

std::unique_ptr<Agent> MakeAgent(LaneSet lanes) {
  return std::make_unique<Agent>("secret", TestSettings(lanes));
}

Key KeyOf(uint8_t number) {
  Key key{};
  key.fill(number);
  return key;
}

void Memory::FillRandom(uint32_t seed) {
  std::minstd_rand random(seed);
  for (uint8_t &byte : bytes_) byte = static_cast<uint8_t>(random() >> 8);
}

std::vector<Span> Memory::Cut(size_t cuts, uint32_t seed) const {
  std::minstd_rand random(seed);
  std::vector<uint64_t> ends = {0, bytes_.size()};
  for (size_t i = 1; i < cuts; ++i) ends.push_back(random() % (bytes_.size() + 1));
  std::sort(ends.begin(), ends.end());
  std::vector<Span> spans;
  for (size_t i = 1; i < ends.size(); ++i) {
    auto address = reinterpret_cast<uint64_t>(bytes_.data()) + ends[i - 1];
    spans.push_back({address, ends[i] - ends[i - 1]});
  }
  return spans;
}

Status Outcome(Completion *completion, double timeout_s) {
  CHECK(Await([&] { return completion->Wait(0.25); }, timeout_s));
  return completion->status();
}

std::optional<Event> AwaitEvent(Agent *agent, Event::Kind kind, double timeout_s) {
  std::optional<Event> found;
  Await(
      [&] {
        for (Event &event : agent->NextEvents(0.1)) {
          if (event.kind == kind) found = std::move(event);
        }
        return found.has_value();
      },
      timeout_s);
  return found;
}

bool Await(const std::function<bool()> &condition, double timeout_s) {
  auto end = Clock::now() + std::chrono::duration<double>(timeout_s);
  while (!condition()) {
    if (Clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

Producer::Producer(size_t nbytes, LaneSet lanes) {
  int to_child[2];
  int from_child[2];
  CHECK(pipe2(to_child, O_CLOEXEC) == 0 && pipe2(from_child, O_CLOEXEC) == 0);
  Fd child_in(to_child[0]);
  Fd child_out(from_child[1]);
  Fd answer(from_child[0]);
  keep_alive_ = Fd(to_child[1]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, child_in.get(), 0);
  posix_spawn_file_actions_adddup2(&actions, child_out.get(), 1);
  std::string size = std::to_string(nbytes);
  std::string lane_set = std::to_string(lanes);
  char self[] = "/proc/self/exe";
  char option[] = "--produce";
  char *arguments[] = {self, option, size.data(), lane_set.data(), nullptr};
  CHECK_EQ(posix_spawn(&pid_, self, &actions, nullptr, arguments, environ), 0);
  posix_spawn_file_actions_destroy(&actions);
  child_out.Reset();
  address_.resize(4096);
  ssize_t got = read(answer.get(), address_.data(), address_.size());
  CHECK(got > 0);
  address_.resize(static_cast<size_t>(got));
}

Producer::~Producer() { Kill(); }

void Producer::Stop() const {
  kill(pid_, SIGSTOP);
  waitpid(pid_, nullptr, WUNTRACED);
}

void Producer::Continue() const { kill(pid_, SIGCONT); }

void Producer::Kill() {
  if (pid_ < 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

int Producer::Main(size_t nbytes, LaneSet lanes) {
  auto agent = MakeAgent(lanes);
  Memory memory(nbytes);
  memory.FillRandom(1);
  agent->regions().Register(KeyOf(1), memory.Cut(7, 1), 1);
  const Bytes &address = agent->address();
  if (write(1, address.data(), address.size()) < 0) return 1;
  char until_closed;
  return read(0, &until_closed, 1) == 0 ? 0 : 1;
}

}  // namespace fixtures
