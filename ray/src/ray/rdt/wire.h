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
static_assert(sizeof(FrameHeader) == 24 && std::is_trivially_copyable_v<FrameHeader>);

enum class Purpose : uint8_t { kControl = 1, kData = 2 };

// Each message lists its fields once, for the encoder and the decoder. Handshake messages
// come first.
struct Error {
  uint16_t version = kProtocolVersion;
  uint8_t code = 0;
  std::string text;
  template <class A>
  void Fields(A &a) {
    a(version), a(code), a(text);
  }
};

struct Hello {
  AgentId agent{};
  Nonce nonce{};
  Purpose purpose = Purpose::kControl;
  template <class A>
  void Fields(A &a) {
    a(agent), a(nonce), a(purpose);
  }
};

struct Challenge {
  AgentId agent{};
  Nonce nonce{};
  template <class A>
  void Fields(A &a) {
    a(agent), a(nonce);
  }
};

struct Proof {
  uint32_t lanes = 0;  // the lanes that the client allows, a bit each
  Mac mac{};
  template <class A>
  void Fields(A &a) {
    a(lanes), a(mac);
  }
};

struct Welcome {
  uint32_t lanes = 0;
  uint64_t probe_address = 0;  // the address of `probe` in the server's memory
  Probe probe{};
  Mac mac{};
  template <class A>
  void Fields(A &a) {
    a(lanes), a(probe_address), a(probe), a(mac);
  }
};

struct PullRequest {
  Key key{};
  uint8_t with_spans = 0;     // the client reads the memory itself
  uint64_t max_attached = 0;  // an object up to this size is sent with the grant
  template <class A>
  void Fields(A &a) {
    a(key), a(with_spans), a(max_attached);
  }
};

struct Grant {
  uint64_t total = 0;
  std::vector<Span> spans;  // empty unless asked for
  Bytes attached;           // all bytes of a small object, which is then not pinned
  template <class A>
  void Fields(A &a) {
    a(total), a(spans), a(attached);
  }
};

struct Refuse {
  uint8_t code = 0;
  std::string text;
  template <class A>
  void Fields(A &a) {
    a(code), a(text);
  }
};

// Requests the checksum of an object.
struct ChecksumRequest {
  Key key{};
  template <class A>
  void Fields(A &a) {
    a(key);
  }
};

// In the REPLY to SUM, after the byte that tells whether it is an error.
struct ChecksumReply {
  uint64_t sum = 0;
  template <class A>
  void Fields(A &a) {
    a(sum);
  }
};

// FREE: the owner no longer needs the objects. OWN: the sender owns them.
struct KeyList {
  std::vector<Key> keys;
  template <class A>
  void Fields(A &a) {
    a(keys);
  }
};

// This frame carries a memfd for the shm lane.
struct Ring {
  uint64_t nbytes = 0;
  template <class A>
  void Fields(A &a) {
    a(nbytes);
  }
};

// Asks to copy a range of pull `request` to `position` in the ring.
struct Fill {
  uint64_t offset = 0;
  uint64_t nbytes = 0;
  uint64_t position = 0;
  template <class A>
  void Fields(A &a) {
    a(offset), a(nbytes), a(position);
  }
};

struct Filled {
  uint64_t position = 0;
  uint8_t is_ok = 0;
  template <class A>
  void Fields(A &a) {
    a(position), a(is_ok);
  }
};

// Asks to send a range of pull `request`. The answer is a DATA header whose length is
// `nbytes`, or 0 if there is no such pull.
struct Read {
  uint64_t offset = 0;
  uint64_t nbytes = 0;
  template <class A>
  void Fields(A &a) {
    a(offset), a(nbytes);
  }
};

class Encoder {
 public:
  explicit Encoder(Bytes *out) : out_(out) {}

  template <class T>
    requires std::is_trivially_copyable_v<T>
  void operator()(const T &value) {
    const auto *bytes = reinterpret_cast<const uint8_t *>(&value);
    out_->insert(out_->end(), bytes, bytes + sizeof(T));
  }
  template <class T>
  void operator()(const std::vector<T> &items) {
    List(items.data(), items.size());
  }
  void operator()(const std::string &text) { List(text.data(), text.size()); }

 private:
  template <class T>
  void List(const T *items, size_t count) {
    (*this)(static_cast<uint32_t>(count));
    const auto *bytes = reinterpret_cast<const uint8_t *>(items);
    out_->insert(out_->end(), bytes, bytes + count * sizeof(T));
  }

  Bytes *out_;
};

// Never reads beyond its input: if a field does not fit, is_ok() is false from then on.
class Decoder {
 public:
  explicit Decoder(ByteView in) : in_(in) {}
  bool is_ok() const { return ok_; }
  bool at_end() const { return in_.empty(); }

  template <class T>
    requires std::is_trivially_copyable_v<T>
  void operator()(T &value) {
    Take(&value, 1);
  }
  template <class T>
  void operator()(std::vector<T> &items) {
    List(&items);
  }
  void operator()(std::string &text) { List(&text); }

 private:
  template <class T>
  void List(T *items) {
    uint32_t count = 0;
    (*this)(count);
    // Checked before memory is allocated for the items.
    ok_ = ok_ && count <= in_.size() / sizeof(typename T::value_type);
    if (!ok_) return;
    items->resize(count);
    Take(items->data(), count);
  }
  template <class T>
  void Take(T *to, size_t count) {
    ok_ = ok_ && in_.size() >= count * sizeof(T);
    if (!ok_ || count == 0) return;
    std::memcpy(to, in_.data(), count * sizeof(T));
    in_ = in_.subspan(count * sizeof(T));
  }

  ByteView in_;
  bool ok_ = true;
};

// The payload of a message.
template <class M>
Bytes Pack(M message) {
  Bytes out;
  Encoder encoder(&out);
  message.Fields(encoder);
  return out;
}

// The message. Empty if the payload is not exactly one message.
template <class M>
std::optional<M> Unpack(ByteView payload) {
  M message;
  Decoder decoder(payload);
  message.Fields(decoder);
  if (!decoder.is_ok() || !decoder.at_end()) return std::nullopt;
  return message;
}

// A frame with its header.
Bytes EncodeFrame(FrameType type, uint64_t request, ByteView payload = {});

template <class M>
Bytes EncodeFrame(FrameType type, uint64_t request, const M &message) {
  return EncodeFrame(type, request, ByteView(Pack(message)));
}

// `bytes` holds at least sizeof(FrameHeader).
FrameHeader DecodeHeader(const uint8_t *bytes);

// "this side speaks version A, the other side version B".
std::string VersionMismatchText(uint16_t mine, uint16_t theirs);

}  // namespace ray::rdt
