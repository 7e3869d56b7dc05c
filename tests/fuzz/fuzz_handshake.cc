// An attacker between a client and a server changes, drops, repeats and invents frames.
// The two sides share a secret, or have different ones. A side finishes only if all its
// input came unchanged from a side with the same secret.
#include <deque>

#include "fuzz.h"
#include "ray/rdt/auth.h"

namespace fuzz {
namespace {

enum Move : uint8_t { kPass, kFlip, kCut, kRepeat, kInvent, kDrop, kMoves };

struct Side {
  Handshake handshake;
  bool is_fooled = false;  // was told something that the other side did not say

  Bytes Tell(const Bytes &frame) {
    if (frame.size() < sizeof(FrameHeader)) return {};
    return handshake.OnFrame(DecodeHeader(frame.data()),
                             ByteView(frame).subspan(sizeof(FrameHeader)));
  }
  void Check() const {
    bool is_done = handshake.state() == Handshake::State::kDone;
    Require(!is_done || !is_fooled, "a side that was lied to is not done");
  }
};

Identity MakeIdentity(uint8_t number, const char *secret) {
  Identity identity;
  identity.agent.fill(number);
  identity.secret = secret;
  identity.lanes = 15;
  return identity;
}

// A frame of the fuzzer's own: a type, and a payload.
Bytes Invent(Script *script) {
  auto type = static_cast<FrameType>(script->Number());
  return EncodeFrame(type, script->Number(), script->Some());
}

// The payload decides, and what of the header is looked at.
bool SaysTheSame(const Bytes &one, const Bytes &other) {
  auto meant = [](const Bytes &frame) {
    FrameHeader header = DecodeHeader(frame.data());
    return std::pair(header.version, header.type);
  };
  return one.size() == other.size() && one.size() >= sizeof(FrameHeader) &&
         meant(one) == meant(other) &&
         std::equal(one.begin() + sizeof(FrameHeader),
                    one.end(),
                    other.begin() + sizeof(FrameHeader));
}

// What arrives instead of `frame`.
std::vector<Bytes> Tamper(Script *script, const Bytes &frame) {
  Bytes changed = frame;
  switch (script->Number() % kMoves) {
  case kFlip:
    changed[script->Number() % changed.size()] ^=
        static_cast<uint8_t>(1 + script->Number());
    return {changed};
  case kCut:
    changed.resize(script->Number() % (changed.size() + 1));
    return {changed};
  case kRepeat:
    return {frame, frame};
  case kInvent:
    return {Invent(script)};
  case kDrop:
    return {};
  default:
    return {frame};
  }
}

void Run(Script *script, const char *client_secret) {
  Identity server = MakeIdentity(2, "secret");
  Side sides[2] = {{Handshake::Client(
                       MakeIdentity(1, client_secret), Purpose::kControl, server.agent)},
                   {Handshake::Server(server)}};
  bool is_known = std::string(client_secret) == server.secret;
  std::deque<std::pair<int, Bytes>> under_way = {{1, sides[0].handshake.FirstFrame()}};
  for (int step = 0; step < 16 && !under_way.empty(); ++step) {
    auto [to, frame] = under_way.front();
    under_way.pop_front();
    for (const Bytes &arrived : Tamper(script, frame)) {
      Side &side = sides[to];
      if (side.handshake.state() != Handshake::State::kRunning) break;
      side.is_fooled |= !is_known || !SaysTheSame(arrived, frame);
      Bytes answer = side.Tell(arrived);
      side.Check();
      if (!answer.empty()) under_way.push_back({1 - to, std::move(answer)});
    }
  }
}

}  // namespace

std::vector<Bytes> Seeds() {
  return {{0},
          {1},
          {0, kFlip, 40, 1},
          {0, kPass, kCut, 30},
          {0, kPass, kPass, kRepeat},
          {0, kPass, kPass, kInvent, 5, 0, 60},
          {0, kDrop}};
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes) {
  fuzz::Script script(fuzz::ByteView(data, nbytes));
  fuzz::Run(&script, script.Number() % 2 == 0 ? "secret" : "another");
  return 0;
}
