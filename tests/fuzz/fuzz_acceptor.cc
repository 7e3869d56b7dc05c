// A whole agent, from its sockets: any bytes before the proof, and any frames after
// it. For any input, the agent continues to serve, sends nothing to a client that has not
// proved the secret, and no byte of an object to a client without its key.
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <memory>

#include "fuzz.h"
#include "ray/rdt/agent.h"
#include "ray/rdt/net.h"

namespace fuzz {
namespace {

constexpr char kSecret[] = "secret";
// Unlike anything that a frame of the agent's holds otherwise.
constexpr uint8_t kTreasure = 0xA7;
constexpr size_t kTreasureRun = 64;

Key KeyOf(uint8_t number) {
  Key key;
  key.fill(number);
  return key;
}

// An agent that serves one object. Its key is random, and yet in some scripts: the
// fuzzer sees what the agent compares, and tries it.
struct Served {
  Served() : memory(300'000, kTreasure), agent(kSecret, Options()) {
    FillRandom(key.data(), key.size());
    Span span{reinterpret_cast<uint64_t>(memory.data()), memory.size()};
    agent.regions().Register(key, {span}, 1);
    address = *ParseAddress(agent.address());
  }

  static Settings Options() {
    Settings settings;
    settings.bind_ip = "127.0.0.1";
    settings.lanes = 15;
    settings.pool_bytes = 1 << 20;
    settings.connect_timeout_s = 5;
    settings.peer_timeout_s = 5;
    return settings;
  }

  bool IsNamedIn(ByteView script) const {
    return std::search(script.begin(), script.end(), key.begin(), key.end()) !=
           script.end();
  }

  Bytes memory;
  Key key;
  Agent agent;
  Address address;
};

// One connection to it. Never waits for longer than ten seconds, for busy machines.
class Caller {
 public:
  explicit Caller(const Served &served, bool over_unix)
      : fd_(over_unix ? ConnectUnix(served.address.agent)
                      : ConnectTcp(served.address.ip, served.address.port)) {
    Require(static_cast<bool>(fd_) && IsReady(POLLOUT), "the agent takes connections");
  }

  void Send(ByteView bytes) {
    while (!bytes.empty() && IsReady(POLLOUT)) {
      ssize_t sent = send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return;
      bytes = bytes.subspan(static_cast<size_t>(sent));
    }
  }

  // With a descriptor beside it.
  void SendRing(uint64_t nbytes) {
    Fd memory(memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (ftruncate(memory.get(), 1 << 16) != 0) return;
    Bytes frame = EncodeFrame(FrameType::kRing, 0, Ring{.nbytes = nbytes});
    iovec piece{frame.data(), frame.size()};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    int fd = memory.get();
    std::memcpy(CMSG_DATA(header), &fd, sizeof(fd));
    sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
  }

  // The next frame; empty when none comes.
  Bytes Receive() {
    Bytes frame(sizeof(FrameHeader));
    if (!Fill(&frame, 0)) return {};
    size_t length = DecodeHeader(frame.data()).length;
    frame.resize(frame.size() + std::min<size_t>(length, 1 << 20));
    return Fill(&frame, sizeof(FrameHeader)) ? frame : Bytes();
  }

  // All that comes until the agent closes as well: then it has read everything.
  Bytes ReceiveAll() {
    shutdown(fd_.get(), SHUT_WR);
    Bytes all;
    uint8_t buffer[4096];
    while (IsReady(POLLIN)) {
      ssize_t got = recv(fd_.get(), buffer, sizeof(buffer), 0);
      if (got <= 0) return all;
      all.insert(all.end(), buffer, buffer + got);
    }
    Require(false, "the agent closes a connection that its other side has closed");
    return all;
  }

  // `early` goes out with the proof, before the agent has let anybody in.
  bool Authenticate(const Served &served, Purpose purpose, ByteView early) {
    Identity self;
    self.agent.fill(7);
    self.secret = kSecret;
    self.lanes = 15;
    auto client = Handshake::Client(self, purpose, served.address.agent);
    Send(client.FirstFrame());
    while (client.state() == Handshake::State::kRunning) {
      Bytes frame = Receive();
      if (frame.empty()) return false;
      Bytes answer = client.OnFrame(DecodeHeader(frame.data()),
                                    ByteView(frame).subspan(sizeof(FrameHeader)));
      if (!answer.empty()) answer.insert(answer.end(), early.begin(), early.end());
      Send(answer);
    }
    return client.state() == Handshake::State::kDone;
  }

 private:
  bool IsReady(short events) const {
    pollfd one{.fd = fd_.get(), .events = events, .revents = 0};
    int count;
    do {  // again where the fuzzer's alarm clock interrupts it
      count = poll(&one, 1, 10'000);
    } while (count < 0 && errno == EINTR);
    return count == 1;
  }

  bool Fill(Bytes *frame, size_t from) const {
    while (from < frame->size()) {
      if (!IsReady(POLLIN)) return false;
      ssize_t got = recv(fd_.get(), frame->data() + from, frame->size() - from, 0);
      if (got <= 0) return false;
      from += static_cast<size_t>(got);
    }
    return true;
  }

  Fd fd_;
};

bool HoldsTreasure(const Bytes &bytes) {
  Bytes run(kTreasureRun, kTreasure);
  return std::search(bytes.begin(), bytes.end(), run.begin(), run.end()) != bytes.end();
}

enum Mode : uint8_t {
  kRawUnix,
  kRawTcp,
  kControl,
  kData,
  kEarlyControl,
  kEarlyData,
  kModes
};

void SendFrames(Caller *caller, Script *script) {
  while (!script->at_end()) {
    uint8_t type = script->Number();
    uint8_t request = script->Number();
    if (type == 0xff) {
      caller->SendRing(uint64_t{request} << 12);
    } else {
      caller->Send(EncodeFrame(static_cast<FrameType>(type), request, script->Some()));
    }
  }
}

Bytes OneFrame(Script *script) {
  uint8_t type = script->Number();
  uint8_t request = script->Number();
  return EncodeFrame(static_cast<FrameType>(type), request, script->Some());
}

void Run(Served *served, Script *script, bool has_key) {
  Mode mode = static_cast<Mode>(script->Number() % kModes);
  bool is_control = mode == kControl || mode == kEarlyControl;
  bool is_early = mode == kEarlyControl || mode == kEarlyData;
  Caller caller(*served, mode == kRawUnix || is_control);
  bool is_authenticated = false;
  if (mode != kRawUnix && mode != kRawTcp) {
    Purpose purpose = is_control ? Purpose::kControl : Purpose::kData;
    Bytes early = is_early ? OneFrame(script) : Bytes();
    is_authenticated = caller.Authenticate(*served, purpose, early);
    Require(is_authenticated || is_early, "a client with the secret is accepted");
    SendFrames(&caller, script);
  } else {
    caller.Send(script->Rest());
  }
  Bytes heard = caller.ReceiveAll();
  Require(((is_authenticated || is_early) && has_key) || !HoldsTreasure(heard),
          "no byte of an object without its key");
  Require(is_authenticated || heard.size() < 512, "a stranger is told little");
  served->agent.NextEvents(0);
}

Bytes Join(std::initializer_list<Bytes> parts) {
  Bytes all;
  for (const Bytes &part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// As SendFrames reads it.
template <class M>
Bytes Scripted(FrameType type, const M &message) {
  Bytes payload = Pack(message);
  Bytes bytes = {static_cast<uint8_t>(type), 1, static_cast<uint8_t>(payload.size())};
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  return bytes;
}

}  // namespace

std::vector<Bytes> Seeds() {
  Bytes pull =
      Scripted(FrameType::kPull, PullRequest{.key = KeyOf(1), .mode = PullMode::kSpans});
  Bytes fill = Scripted(FrameType::kFill, Fill{.offset = 0, .nbytes = 100});
  Bytes keys = Scripted(FrameType::kOwn, KeyList{.keys = {KeyOf(1)}});
  Bytes free = Scripted(FrameType::kFree, KeyList{.keys = {KeyOf(2)}});
  Bytes sum = Scripted(FrameType::kChecksum, ChecksumRequest{.key = KeyOf(1)});
  Bytes read = Scripted(FrameType::kRead, Read{.offset = 0, .nbytes = 100});
  Bytes hello = EncodeFrame(FrameType::kHello, 0, Hello{});
  Bytes proof = EncodeFrame(FrameType::kProof, 0, Proof{});
  return {Join({{kRawUnix}, hello, proof}),
          Join({{kRawTcp}, hello, hello}),
          Join({{kControl}, pull, {0xff, 16}, fill, keys, free, sum}),
          Join({{kControl, 22, 1, 5, 'h', 'e', 'l', 'l', 'o'}, {20, 1, 0}, {27, 1, 0}}),
          Join({{kData}, read, read}),
          Join({{kEarlyControl}, pull, fill}),
          Join({{kEarlyData}, read, read})};
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes) {
  static auto *served = new fuzz::Served();
  fuzz::ByteView bytes(data, nbytes);
  fuzz::Script script(bytes);
  fuzz::Run(served, &script, served->IsNamedIn(bytes));
  return 0;
}
