#include "check.h"
#include "ray/rdt/address.h"
#include "ray/rdt/auth.h"

namespace ray::rdt {
namespace {

Identity MakeIdentity(uint8_t number, std::string secret = "secret") {
  Identity identity;
  identity.agent.fill(number);
  identity.secret = std::move(secret);
  identity.lanes = number;
  identity.probe_address = 4096;
  return identity;
}

struct Pair {
  Handshake client;
  Handshake server;
};

Pair MakePair(std::string server_secret = "secret") {
  Identity server = MakeIdentity(2, std::move(server_secret));
  return {Handshake::Client(MakeIdentity(1), Purpose::kData, server.agent),
          Handshake::Server(server)};
}

Bytes Feed(Handshake *side, Bytes frame) {
  FrameHeader header = DecodeHeader(frame.data());
  return side->OnFrame(header, ByteView(frame).subspan(sizeof(FrameHeader)));
}

TEST("auth: HMAC-SHA256 agrees with RFC 4231, test case 2") {
  std::string data = "what do ya want for nothing?";
  ByteView view(reinterpret_cast<const uint8_t *>(data.data()), data.size());
  CHECK_EQ(Hex(HmacSha256("Jefe", {view})),
           "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

TEST("auth: two sides with one secret learn about each other") {
  Pair pair = MakePair();
  Bytes challenge = Feed(&pair.server, pair.client.FirstFrame());
  Bytes welcome = Feed(&pair.server, Feed(&pair.client, challenge));
  CHECK(Feed(&pair.client, welcome).empty());
  CHECK(pair.client.state() == Handshake::State::kDone);
  CHECK(pair.server.state() == Handshake::State::kDone);
  CHECK(pair.server.peer().purpose == Purpose::kData);
  CHECK_EQ(pair.server.peer().lanes, 1u);
  CHECK_EQ(pair.client.peer().lanes, 2u);
  CHECK_EQ(pair.client.peer().probe_address, 4096u);
}

TEST("auth: a client without the secret gets in nowhere, and is told so") {
  Pair pair = MakePair("another");
  Bytes challenge = Feed(&pair.server, pair.client.FirstFrame());
  Bytes error = Feed(&pair.server, Feed(&pair.client, challenge));
  CHECK(pair.server.state() == Handshake::State::kFailed);
  CHECK(pair.server.status().code == Code::kAuth);
  Feed(&pair.client, error);
  CHECK(pair.client.status().code == Code::kAuth);
}

TEST("auth: a server without the secret is not believed") {
  Pair pair = MakePair("another");
  Bytes proof = Feed(&pair.client, Feed(&pair.server, pair.client.FirstFrame()));
  Feed(&pair.client, EncodeFrame(FrameType::kWelcome, 0, Welcome{.lanes = 2}));
  CHECK(pair.client.status().code == Code::kAuth);
}

TEST("auth: a recorded proof does not work a second time") {
  Pair first = MakePair();
  Bytes hello = first.client.FirstFrame();
  Bytes proof = Feed(&first.client, Feed(&first.server, hello));
  Feed(&first.server, proof);
  CHECK(first.server.state() == Handshake::State::kDone);
  Pair second = MakePair();
  Feed(&second.server, hello);
  Feed(&second.server, proof);
  CHECK(second.server.status().code == Code::kAuth);
}

TEST("auth: a changed lane set or purpose breaks the proof") {
  Pair pair = MakePair();
  Bytes proof = Feed(&pair.client, Feed(&pair.server, pair.client.FirstFrame()));
  proof[sizeof(FrameHeader)] ^= 1;
  Feed(&pair.server, proof);
  CHECK(pair.server.status().code == Code::kAuth);
  Pair other = MakePair();
  Bytes hello = other.client.FirstFrame();
  hello.back() = static_cast<uint8_t>(Purpose::kControl);
  Feed(&other.server, Feed(&other.client, Feed(&other.server, hello)));
  CHECK(other.server.status().code == Code::kAuth);
}

TEST("auth: a version apart, both sides name both versions") {
  Pair pair = MakePair();
  Bytes hello = pair.client.FirstFrame();
  uint16_t other = 7;
  std::memcpy(hello.data() + offsetof(FrameHeader, version), &other, sizeof(other));
  Bytes error = Feed(&pair.server, hello);
  CHECK(pair.server.status().code == Code::kVersion);
  CHECK(pair.server.status().text.find("version " + std::to_string(kProtocolVersion)) !=
        std::string::npos);
  CHECK(pair.server.status().text.find("version 7") != std::string::npos);
  std::memcpy(error.data() + offsetof(FrameHeader, version), &other, sizeof(other));
  Feed(&pair.client, error);
  CHECK(pair.client.status().code == Code::kVersion);
  CHECK(pair.client.status().text.find("version 7") != std::string::npos);
}

TEST("auth: frames out of order or malformed end the handshake") {
  Pair pair = MakePair();
  Feed(&pair.server, EncodeFrame(FrameType::kPull, 1));
  CHECK(pair.server.state() == Handshake::State::kFailed);
  Pair other = MakePair();
  Feed(&other.server, EncodeFrame(FrameType::kHello, 0));
  CHECK(other.server.state() == Handshake::State::kFailed);
}

TEST("auth: another agent at the address is not the one that was meant") {
  Pair pair = MakePair();
  Handshake stranger = Handshake::Server(MakeIdentity(3));
  Feed(&pair.client, Feed(&stranger, pair.client.FirstFrame()));
  CHECK(pair.client.status().code == Code::kUnreachable);
}

}  // namespace
}  // namespace ray::rdt
