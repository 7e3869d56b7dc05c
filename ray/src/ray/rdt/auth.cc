#include "ray/rdt/auth.h"

#include <sodium/crypto_auth_hmacsha256.h>
#include <sodium/utils.h>
#include <sys/random.h>

#include <cerrno>
#include <system_error>

namespace ray::rdt {
namespace {

constexpr char kClientRole[] = "ray-rdt client v1";
constexpr char kServerRole[] = "ray-rdt server v1";
constexpr char kBadProof[] =
    "the other side does not know this cluster's RDT secret (authentication failed)";

void Append(Bytes *to, ByteView more) { to->insert(to->end(), more.begin(), more.end()); }

// The fields that the server's MAC covers besides the transcript.
Bytes WelcomeExtra(uint32_t client_lanes, const Welcome &welcome) {
  return PackFields(client_lanes, welcome.lanes, welcome.probe_address, welcome.probe);
}

bool EqualConstantTime(const Mac &a, const Mac &b) {
  return sodium_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace

void FillRandom(void *to, size_t nbytes) {
  auto *at = static_cast<uint8_t *>(to);
  while (nbytes > 0) {
    ssize_t got = getrandom(at, nbytes, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw std::system_error(errno, std::generic_category(), "getrandom");
    at += got;
    nbytes -= static_cast<size_t>(got);
  }
}

Mac HmacSha256(const std::string &secret, const std::vector<ByteView> &parts) {
  crypto_auth_hmacsha256_state state;
  crypto_auth_hmacsha256_init(
      &state, reinterpret_cast<const uint8_t *>(secret.data()), secret.size());
  for (ByteView part : parts) {
    crypto_auth_hmacsha256_update(&state, part.data(), part.size());
  }
  Mac mac;
  static_assert(sizeof(mac) == crypto_auth_hmacsha256_BYTES);
  crypto_auth_hmacsha256_final(&state, mac.data());
  return mac;
}

Handshake Handshake::Client(const Identity &self,
                            Purpose purpose,
                            const AgentId &expected) {
  Handshake client(self);
  client.peer_.purpose = purpose;
  client.expected_ = expected;
  client.awaited_ = FrameType::kChallenge;
  return client;
}

Handshake Handshake::Server(const Identity &self) { return Handshake(self); }

Bytes Handshake::FirstFrame() {
  Hello hello{.agent = self_.agent, .nonce = {}, .purpose = peer_.purpose};
  FillRandom(hello.nonce.data(), hello.nonce.size());
  transcript_ = Pack(hello);
  return EncodeFrame(FrameType::kHello, 0, ByteView(transcript_));
}

Bytes Handshake::OnFrame(const FrameHeader &header, ByteView payload) {
  if (header.version != kProtocolVersion) {
    return Fail(Code::kVersion, VersionMismatchText(header.version));
  }
  if (header.type == FrameType::kError) return OnError(payload);
  if (header.type != awaited_) return Fail(Code::kAuth, "a frame out of order");
  switch (header.type) {
  case FrameType::kHello:
    return OnHello(payload);
  case FrameType::kChallenge:
    return OnChallenge(payload);
  case FrameType::kProof:
    return OnProof(payload);
  default:
    return OnWelcome(payload);
  }
}

Bytes Handshake::OnHello(ByteView payload) {
  auto hello = Unpack<Hello>(payload);
  bool is_valid =
      hello && (hello->purpose == Purpose::kControl || hello->purpose == Purpose::kData);
  if (!is_valid) return Fail(Code::kAuth, "a malformed HELLO");
  peer_.agent = hello->agent;
  peer_.purpose = hello->purpose;
  Challenge challenge{.agent = self_.agent, .nonce = {}};
  FillRandom(challenge.nonce.data(), challenge.nonce.size());
  Bytes mine = Pack(challenge);
  Append(&transcript_, payload);
  Append(&transcript_, mine);
  awaited_ = FrameType::kProof;
  return EncodeFrame(FrameType::kChallenge, 0, ByteView(mine));
}

Bytes Handshake::OnChallenge(ByteView payload) {
  auto challenge = Unpack<Challenge>(payload);
  if (!challenge) return Fail(Code::kAuth, "a malformed CHALLENGE");
  if (challenge->agent != expected_) {
    return Fail(Code::kUnreachable, "another agent answers at the peer's address");
  }
  peer_.agent = challenge->agent;
  Append(&transcript_, payload);
  Proof proof{.lanes = self_.lanes,
              .mac = ComputeMac(kClientRole, PackFields(self_.lanes))};
  awaited_ = FrameType::kWelcome;
  return EncodeFrame(FrameType::kProof, 0, proof);
}

Bytes Handshake::OnProof(ByteView payload) {
  auto proof = Unpack<Proof>(payload);
  if (!proof) return Fail(Code::kAuth, "a malformed PROOF");
  if (!EqualConstantTime(proof->mac, ComputeMac(kClientRole, PackFields(proof->lanes)))) {
    return Fail(Code::kAuth, kBadProof);
  }
  peer_.lanes = proof->lanes;
  Welcome welcome{
      .lanes = self_.lanes, .probe_address = self_.probe_address, .probe = self_.probe};
  welcome.mac = ComputeMac(kServerRole, WelcomeExtra(proof->lanes, welcome));
  state_ = State::kDone;
  return EncodeFrame(FrameType::kWelcome, 0, welcome);
}

Bytes Handshake::OnWelcome(ByteView payload) {
  auto welcome = Unpack<Welcome>(payload);
  if (!welcome) return Fail(Code::kAuth, "a malformed WELCOME");
  Mac expected = ComputeMac(kServerRole, WelcomeExtra(self_.lanes, *welcome));
  if (!EqualConstantTime(welcome->mac, expected)) return Fail(Code::kAuth, kBadProof);
  peer_.lanes = welcome->lanes;
  peer_.probe_address = welcome->probe_address;
  peer_.probe = welcome->probe;
  state_ = State::kDone;
  return {};
}

Bytes Handshake::Fail(Code code, const std::string &text) {
  state_ = State::kFailed;
  status_ = {code, text};
  Error error{.code = static_cast<uint8_t>(code), .text = text};
  return EncodeFrame(FrameType::kError, 0, error);
}

Bytes Handshake::OnError(ByteView payload) {
  auto error = Unpack<Error>(payload);
  state_ = State::kFailed;
  if (!error) {
    status_ = {Code::kAuth, "the peer ended the handshake with a malformed ERROR"};
  } else if (error->version != kProtocolVersion) {
    status_ = {Code::kVersion, VersionMismatchText(error->version)};
  } else {
    status_ = {CodeFromWire(error->code), "the peer answered: " + error->text};
  }
  return {};
}

Mac Handshake::ComputeMac(const char *role, const Bytes &extra) const {
  const auto *name = reinterpret_cast<const uint8_t *>(role);
  return HmacSha256(self_.secret,
                    {ByteView(name, sizeof(kClientRole)), transcript_, extra});
}

}  // namespace ray::rdt
