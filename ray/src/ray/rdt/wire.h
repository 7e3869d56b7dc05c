// The protocol between two agents: all frames and their fields.
//
// A frame is a 24-byte header and `length` bytes of payload, all little-endian.
// Connections have one purpose each: control (requests and small answers) or
// data (READ frames one way, DATA headers with raw bytes the other way).
//
//   client                                server
//   HELLO {agent, nonce, purpose}    ->
//                                    <-   CHALLENGE {agent, nonce}
//   PROOF {lanes, mac}               ->
//                                    <-   WELCOME {lanes, probe, mac}
//   then any of PULL DONE ABORT OWN FREE CALL SUM RING FILL PING   (control)
//   or READ                                                (data)
//
// Two parts never change, so that versions can recognize each other: the header's layout,
// and ERROR {version, code, text}.
//
// Runs on: any thread; has no state.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "ray/rdt/spans.h"

namespace ray::rdt {

static_assert(std::endian::native == std::endian::little,
              "fields are copied in their memory layout");

inline constexpr uint32_t kMagic = 0x54445252;  // "RRDT"
inline constexpr uint16_t kProtocolVersion = 2;

using Bytes = std::vector<uint8_t>;
using ByteView = std::span<const uint8_t>;
using AgentId = std::array<uint8_t, 16>;
using Key = std::array<uint8_t, 16>;
using Nonce = std::array<uint8_t, 32>;
using Mac = std::array<uint8_t, 32>;
using Probe = std::array<uint8_t, 16>;

// Numbers are part of the protocol: never reuse one.
enum class FrameType : uint16_t {
  kError = 1,
  kHello = 2,
  kChallenge = 3,
  kProof = 4,
  kWelcome = 5,
  kPull = 16,
  kGrant = 17,
  kRefuse = 18,
  kDone = 19,
  kAbort = 20,
  kFree = 21,
  kCall = 22,
  kReply = 23,
  kRing = 24,
  kFill = 25,
  kFilled = 26,
  kPing = 27,
  kPong = 28,
  kOwn = 29,
  kChecksum = 30,  // answered by REPLY
  kFile = 31,      // carries a memfd for the pull's GRANT
  kRead = 32,
  kData = 33,
};

struct FrameHeader {
  uint32_t magic = kMagic;
  uint16_t version = kProtocolVersion;
  FrameType type = FrameType::kError;
  uint64_t length = 0;   // of the payload
  uint64_t request = 0;  // pull id or call id, chosen by the client
};
inline constexpr size_t kHeaderBytes = sizeof(FrameHeader);
static_assert(kHeaderBytes == 24 && std::is_trivially_copyable_v<FrameHeader>);

enum class Purpose : uint8_t { kControl = 1, kData = 2 };

// Each message lists its fields once, for the encoder and the decoder. Handshake messages
// come first.
struct Error {
  uint16_t version = kProtocolVersion;
  uint8_t code = 0;
  std::string text;
  auto Fields() { return std::tie(version, code, text); }
};

struct Hello {
  AgentId agent{};
  Nonce nonce{};
  Purpose purpose = Purpose::kControl;
  auto Fields() { return std::tie(agent, nonce, purpose); }
};

struct Challenge {
  AgentId agent{};
  Nonce nonce{};
  auto Fields() { return std::tie(agent, nonce); }
};

struct Proof {
  uint32_t lanes = 0;  // the lanes that the client allows, a bit each
  Mac mac{};
  auto Fields() { return std::tie(lanes, mac); }
};

struct Welcome {
  uint32_t lanes = 0;
  uint64_t probe_address = 0;  // the address of `probe` in the server's memory
  Probe probe{};
  Mac mac{};
  auto Fields() { return std::tie(lanes, probe_address, probe, mac); }
};

// The part of the grant that a consumer needs.
enum class PullMode : uint8_t {
  kStream = 0,  // nothing: the producer sends the bytes
  kSpans = 1,   // the addresses: the consumer reads the memory
  kFile = 2,    // a copy in a file, which the consumer maps
  kAny = 3,     // kSpans or kFile, as the producer decides
};

struct PullRequest {
  Key key{};
  PullMode mode = PullMode::kStream;
  uint64_t max_attached = 0;  // an object up to this size is sent with the grant
  auto Fields() { return std::tie(key, mode, max_attached); }
};

struct Grant {
  uint64_t total = 0;
  // The addresses, or the positions in the files. Empty with kStream.
  std::vector<Span> spans;
  Bytes files;     // for each span the number of its FILE frame; empty: addresses
  Bytes attached;  // all bytes of a small object, which is then not pinned
  auto Fields() { return std::tie(total, spans, files, attached); }
};

struct File {
  uint64_t nbytes = 0;
  auto Fields() { return std::tie(nbytes); }
};

struct Refuse {
  uint8_t code = 0;
  std::string text;
  auto Fields() { return std::tie(code, text); }
};

// Requests the checksum of an object.
struct ChecksumRequest {
  Key key{};
  auto Fields() { return std::tie(key); }
};

// In the REPLY to SUM, after the byte that tells whether it is an error.
struct ChecksumReply {
  uint64_t sum = 0;
  auto Fields() { return std::tie(sum); }
};

// FREE: the owner no longer needs the objects. OWN: the sender owns them.
struct KeyList {
  std::vector<Key> keys;
  auto Fields() { return std::tie(keys); }
};

// This frame carries a memfd for the shm lane.
struct Ring {
  uint64_t nbytes = 0;
  auto Fields() { return std::tie(nbytes); }
};

// Asks to copy a range of pull `request` to `position` in the ring.
struct Fill {
  uint64_t offset = 0;
  uint64_t nbytes = 0;
  uint64_t position = 0;
  auto Fields() { return std::tie(offset, nbytes, position); }
};

struct Filled {
  uint64_t position = 0;
  uint8_t is_ok = 0;
  auto Fields() { return std::tie(position, is_ok); }
};

// Asks to send a range of pull `request`. The answer is a DATA header whose length is
// `nbytes`, or 0 if there is no such pull.
struct Read {
  uint64_t offset = 0;
  uint64_t nbytes = 0;
  auto Fields() { return std::tie(offset, nbytes); }
};

// The field's bytes in memory. A string or vector follows its length.
template <class T>
void AppendField(const T &field, Bytes *out) {
  if constexpr (std::is_trivially_copyable_v<T>) {
    const auto *begin = reinterpret_cast<const uint8_t *>(&field);
    out->insert(out->end(), begin, begin + sizeof(T));
  } else {
    AppendField(static_cast<uint32_t>(field.size()), out);
    const auto *begin = reinterpret_cast<const uint8_t *>(field.data());
    out->insert(out->end(), begin, begin + field.size() * sizeof(field[0]));
  }
}

template <class... T>
Bytes PackFields(const T &...fields) {
  Bytes out;
  (AppendField(fields, &out), ...);
  return out;
}

// Never reads beyond its input: if a field does not fit, is_ok() is false from then on.
class Decoder {
 public:
  explicit Decoder(ByteView in) : in_(in) {}
  bool is_ok() const { return ok_; }
  bool at_end() const { return in_.empty(); }

  template <class T>
  void Take(T &field) {
    if constexpr (std::is_trivially_copyable_v<T>) {
      CopyTo(&field, sizeof(T));
    } else {
      uint32_t count = 0;
      Take(count);
      // Checked before memory is allocated for the items.
      ok_ = ok_ && count <= in_.size() / sizeof(field[0]);
      if (!ok_) return;
      field.resize(count);
      CopyTo(field.data(), count * sizeof(field[0]));
    }
  }

 private:
  void CopyTo(void *to, size_t nbytes) {
    ok_ = ok_ && in_.size() >= nbytes;
    if (!ok_ || nbytes == 0) return;
    std::memcpy(to, in_.data(), nbytes);
    in_ = in_.subspan(nbytes);
  }

  ByteView in_;
  bool ok_ = true;
};

// The payload of a message.
template <class M>
Bytes Pack(M message) {
  return std::apply([](auto &...fields) { return PackFields(fields...); },
                    message.Fields());
}

// The message. Empty if the payload is not exactly one message.
template <class M>
std::optional<M> Unpack(ByteView payload) {
  M message;
  Decoder decoder(payload);
  std::apply([&](auto &...fields) { (decoder.Take(fields), ...); }, message.Fields());
  if (!decoder.is_ok() || !decoder.at_end()) return std::nullopt;
  return message;
}

// A frame with its header.
inline Bytes EncodeFrame(FrameType type, uint64_t request, ByteView payload = {}) {
  FrameHeader header{.type = type, .length = payload.size(), .request = request};
  Bytes frame(kHeaderBytes + payload.size());
  std::memcpy(frame.data(), &header, kHeaderBytes);
  if (!payload.empty()) {
    std::memcpy(frame.data() + kHeaderBytes, payload.data(), payload.size());
  }
  return frame;
}

template <class M>
Bytes EncodeFrame(FrameType type, uint64_t request, const M &message) {
  return EncodeFrame(type, request, ByteView(Pack(message)));
}

// `bytes` holds at least kHeaderBytes.
inline FrameHeader DecodeHeader(const uint8_t *bytes) {
  FrameHeader header;
  std::memcpy(&header, bytes, kHeaderBytes);
  return header;
}

inline std::string VersionMismatchText(uint16_t theirs) {
  return "RDT protocol versions differ: this side speaks version " +
         std::to_string(kProtocolVersion) + ", the other side version " +
         std::to_string(theirs);
}

}  // namespace ray::rdt
